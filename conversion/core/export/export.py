"""Export: a checkpoint as transformers loads it without this library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from zoo.architectures.core import formats, load
from zoo.architectures.core.formats import Canonical
from zoo.architectures.core.hub import HUB_ID, resolve
from zoo.architectures.core.shards import Spec, atomic_directory, parse_size, refuse_existing, write_json, write_tensors
from zoo.conversion.core import models
from zoo.conversion.core.card import LICENCE_FIELDS, base_card
from zoo.conversion.core.convert import carry, require_tokenizer
from zoo.conversion.core.export import native, remote
from zoo.conversion.core.verify import RUN_LIMIT
from zoo.errors import ZooError

REMOTE = "remote-code"
TOLERANCE = 1e-4  # of the logits' standard deviation
LENGTH = 64
TEXT = """
# {name}

The same model as `{source}`, for plain transformers: {how}. Exported with hybrid-zoo.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{option})
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""


@dataclass(frozen=True)
class Exported:
    """What was written to `out`: the class that loads it, and the largest difference from our logits, in their
    standard deviations (None: not run)."""

    out: Path
    architecture: str
    worst: float | None


def export(
    path: str | Path,
    out: str | Path,
    to: str = "native",
    *,
    max_shard_size: int | str = "5GB",
    **where: Any,
) -> Exported:
    """Write a checkpoint for transformers without this library; every tensor is streamed.

    Args:
        path: a released checkpoint, a directory or a hub id, ours or of a published format.
        out: the directory to write; nothing may be there yet.
        to: `native`, a class of transformers that computes the same; one of them, by its name
            (`Qwen3_5ForCausalLM`) or model type; or `remote-code`, with a modeling file for `trust_remote_code`.
        max_shard_size: bytes, or text such as "500MB".
        **where: revision, token, cache_dir, local_files_only, subfolder, as in huggingface_hub.

    Raises:
        ZooError: bad input, or a model that the class cannot hold, with the reason by layer and field; nothing is left
            at `out` then.
    """
    out = Path(out)
    refuse_existing(out)
    parse_size(max_shard_size)
    source = formats.read(resolve(path, **where))
    require_tokenizer(source.checkpoint.path)
    made = _remote(source) if to == REMOTE else native.fit(source, to)
    with atomic_directory(out) as folder:
        write_json(folder / "config.json", made.config)
        write_tensors(folder, made.specs, made.get, max_shard_size)
        carry(source.checkpoint.path, folder)
        if to == REMOTE:
            (folder / f"{remote.FILE}.py").write_text(remote.code(source), encoding="utf-8")
        _check_tokenizer(source, folder, made.config["model_type"])
        worst = None if to == REMOTE else _check(source, folder)
        _write_card(source, folder, str(path), out.name, made.config["architectures"][0], to == REMOTE)
    return Exported(out, made.config["architectures"][0], worst)


def _remote(source: Canonical) -> native.Exported:
    specs = {name: Spec(step.shape, step.dtype) for name, step in source.steps.items()}
    return native.Exported(remote.config(source), specs, source.get)


def _check(source: Canonical, folder: Path) -> float | None:
    """The largest difference between our logits and those of transformers' class, in standard deviations."""
    if sum(torch.Size(step.shape).numel() for step in source.steps.values()) > RUN_LIMIT:
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(source.config.vocab_size, (2, LENGTH), generator=generator)
    ours: Tensor = models.logits(load.from_canonical(source, torch.float32), ids)
    theirs = models.transformers_logits(folder, ids)
    worst = float((ours - theirs).abs().max() / ours.std())
    if not worst <= TOLERANCE:
        raise ZooError(f"the exported model computes something else (logits differ by {worst:.1e}); please report it")
    return worst


def _check_tokenizer(source: Canonical, folder: Path, model_type: str) -> None:
    """transformers takes the class of a tokenizer from the model's type in some cases, whatever was saved."""
    texts = [models.SAMPLE_TEXT, " 12345\n\tÄé漢 <s>"]
    if models.encode(folder, texts) != models.encode(source.checkpoint.path, texts):
        raise ZooError(f"transformers gives {model_type} another tokenizer than the model has; export it to {REMOTE}")


def _write_card(source: Canonical, folder: Path, path: str, name: str, architecture: str, remote_code: bool) -> None:
    """`README.md`, with the licence and the base model that the source's card names."""
    inherited = base_card(source.checkpoint.path, path)
    licence = {field: inherited[field] for field in LICENCE_FIELDS if inherited.get(field)}
    hub_id = path if HUB_ID.fullmatch(path) and not Path(path).exists() else None
    data = ModelCardData(
        base_model=inherited.get("base_model") or hub_id,
        language=inherited.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=inherited.get("tags") or ["hybrid-zoo"],
        **{"license": "unknown", **licence},
    )
    how = "its code lies beside it, in `modeling_zoo.py`" if remote_code else f"its class is `{architecture}`"
    option = ", trust_remote_code=True" if remote_code else ""
    text = TEXT.format(name=name, source=Path(path).name, how=how, option=option)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / "README.md")
