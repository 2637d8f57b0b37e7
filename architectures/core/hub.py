"""From a name to a directory: released weights, a local directory, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo import registry
from zoo.architectures.core.checkpoint import read_json
from zoo.errors import ZooError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
DOWNLOADED = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
SAFE, PICKLED = ("*.safetensors",), ("*.bin", "*.pth")
SKIPPED = ("consolidated*", "training_args.bin", "optimizer*", "scheduler*")


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> Path:
    """The directory of a checkpoint.

    Args:
        name: released weights of the zoo; a directory (`./name` or a `Path`, where the zoo has that name too); else a
            hub id `owner/name`.
        revision, token, cache_dir, local_files_only: as in huggingface_hub, for hub ids.
        subfolder: the checkpoint's folder inside.

    Raises:
        ZooError: nothing of that name, an architecture without weights, an adapter, or a failed download.
    """
    path = _found(
        name, subfolder, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    refuse_adapter(path)
    return path


def refuse_adapter(path: Path) -> None:
    """Raise `ZooError` for a directory with an adapter of peft: its weights, or what they add, would go unread."""
    file = path / "adapter_config.json"
    if not file.is_file():
        return
    config = read_json(file, "adapter config")
    kind, base = config.get("peft_type", "LORA"), config.get("base_model_name_or_path") or "its base model"
    raise ZooError(
        f"{path} is a {kind} adapter of {base} ({file.name}), not a whole model; merge it into that with peft "
        "(merge_and_unload), save the result with its tokenizer, and give its directory"
    )


def _found(name: str | Path, subfolder: str, **where: Any) -> Path:
    text = str(name)
    if text in registry.names("checkpoints") and not isinstance(name, Path):
        return _inside(Path(str(files("zoo").joinpath("model_cards", "checkpoints", text))), subfolder)
    if text in registry.names("architectures") and not isinstance(name, Path):
        raise ZooError(
            f"architecture {text!r} has no weights; zoo.create({text!r}) makes random ones, ./{text} is a directory"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return _inside(path, subfolder)
    if path.is_file():
        raise ZooError(f"{text} is a file; give the checkpoint directory that holds it")
    if isinstance(name, Path) or not HUB_ID.fullmatch(text):
        raise _nothing(text)
    return _inside(_download(text, subfolder, where), subfolder)


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(". ")


def _inside(path: Path, subfolder: str) -> Path:
    if subfolder and not (path / subfolder).is_dir():
        raise ZooError(f"{path} has no subfolder {subfolder!r}; leave it out or name one that exists")
    return path / subfolder if subfolder else path


def _nothing(name: str) -> ZooError:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return ZooError(f"no directory at {name}; check the path")
    hint = str(registry.unknown("checkpoints", name)).partition("; ")[2]
    return ZooError(f"{name!r} is no released checkpoint, no directory and no hub id (owner/name); {hint}")


def _download(name: str, subfolder: str, where: dict[str, Any]) -> Path:
    path = _snapshot(name, (*DOWNLOADED, *SAFE), subfolder, where)
    if not any((path / subfolder).glob("*.safetensors")):
        path = _snapshot(name, (*DOWNLOADED, *PICKLED), subfolder, where)
    return path


def _snapshot(name: str, patterns: tuple[str, ...], subfolder: str, where: dict[str, Any]) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    prefix = f"{subfolder}/" if subfolder else ""
    allow = [f"{prefix}{pattern}" for pattern in patterns]
    ignore = [f"{prefix}{pattern}" for pattern in (*SKIPPED, "*/*")]
    try:
        return Path(snapshot_download(name, allow_patterns=allow, ignore_patterns=ignore, **where))
    except GatedRepoError:
        reason = "the hub wants its conditions accepted first: do so on its page, then pass token= or run hf auth login"
    except RevisionNotFoundError:
        reason = f"it has no revision {where['revision']!r}"
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private: check the name, or pass token="
    except LocalEntryNotFoundError:
        reason = "it is not in the cache and the hub cannot be reached: connect, or give a local directory"
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        reason = f"the download failed ({one_line(error)}): try again, or give a local directory"
    raise ZooError(f"no directory {name!r} here, and as a hub id {reason}")
