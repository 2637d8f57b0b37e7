"""Conversion of a softmax-attention checkpoint to a hybrid: plan, stream, verify, and only then keep."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.architectures.core import formats
from zoo.architectures.core.checkpoint import read_json
from zoo.architectures.core.hub import TOKENIZER_FILES, resolve
from zoo.architectures.core.resumable import Unfinished, resumable_directory
from zoo.architectures.core.shards import parse_size, refuse_existing, write_json
from zoo.conversion.core.calibrated import calibrate, check_init
from zoo.conversion.core.card import write_card
from zoo.conversion.core.planner import Plan, build_plan, choose
from zoo.conversion.core.streaming import identity, versions, write_shards
from zoo.conversion.core.verify import Check, run_checks
from zoo.errors import ZooError

RECORD = "zoo_conversion.json"
CARRIED_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class Report:
    """What a conversion did: its `plan`, and the `checks` that it passed (none in a dry run, which has no `out`)."""

    plan: Plan
    checks: dict[str, Check] = field(default_factory=dict)
    out: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check["passed"] is not False for check in self.checks.values())


def convert(
    source: str | Path,
    out: str | Path,
    *,
    mixer: str | None = None,
    keep: Sequence[int] = (),
    keep_heads: Mapping[int, Sequence[int]] | None = None,
    layout: str | None = None,
    mixer_args: Mapping[str, Any] | None = None,
    init: str = "plain",
    calibration_data: str = "self",
    rope: str = "keep",
    dry_run: bool = False,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    fresh_process: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> Report:
    """Replace softmax attention by another mixer, transferring every weight that has a place in it.

    Args:
        source: a released checkpoint, a directory or a hub id, of a published softmax format or ours.
        out: the directory to write; nothing may be there yet.
        mixer: what every layer not in `keep` becomes; arguments may follow: `attention(window=64,sinks=1)`.
        keep: layers, from 0, that keep their attention.
        keep_heads: by layer, heads that stay softmax attention beside the mixer of the others: `{11: [0, 2]}`.
        layout: instead of `mixer`, one mixer per layer: `gated_delta_net*3,attention`, tiled over the layers.
        mixer_args: arguments for the new mixers.
        init: how new parameters start: "plain", near a no-op; or "calibrated", from what the attention does on a little
            text, for which the source runs whole, in fp32.
        calibration_data: that text, as `heal` takes it: a file, a directory, `self` (sampled from the source).
        rope: "keep" the source's RoPE in the new layers, "drop" it, or "hype": keep it there and drop it in the kept
            full attention, whose logits grow with the position instead (such layers are no longer the source's).
        dry_run: plan only: no tensor is read, nothing is written.
        seed: of new parameters that start at random; each tensor's own seed comes from its name and this.
        max_shard_size: bytes, or text such as "500MB".
        fresh_process: also load the output in a new process and compare.
        revision, token, cache_dir, local_files_only, subfolder: how to find `source`, as in huggingface_hub.

    Returns:
        The plan and the checks, which also stand in `out/verification.json`.

    Raises:
        ZooError: bad input, or a check that failed; nothing is left at `out` then, and nothing beside it.
        KeyboardInterrupt: Ctrl-C or SIGTERM. After this, or any death of the process, finished shards are in
            `OUT.partial`; the same call goes on from them.
    """
    out = Path(out)
    refuse_existing(out)
    parse_size(max_shard_size)
    path = resolve(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        subfolder=subfolder,
    )
    canonical = formats.read(path)
    swaps = choose(canonical.decoder, mixer, mixer_args, layout, keep, keep_heads)
    plan = build_plan(canonical, swaps, seed, rope)
    check_init(plan, init, calibration_data)
    require_tokenizer(path)
    if dry_run:
        return Report(plan)
    plan = calibrate(plan, calibration_data) if init == "calibrated" else plan
    with resumable_directory(out, identity(plan, parse_size(max_shard_size))) as unfinished:
        folder = unfinished.folder
        _write(plan, unfinished, max_shard_size)
        write_json(folder / RECORD, _record(plan, str(source), path, mixer, layout))
        checks = run_checks(plan, folder, fresh_process=fresh_process)
        write_json(folder / "verification.json", {"ok": True, "checks": checks})
        write_card(plan, folder, str(source), checks)
    return Report(plan, checks, out)


def require_tokenizer(path: Path) -> None:
    """Raise `ZooError` for a checkpoint directory without a tokenizer."""
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise ZooError(f"{path} has no tokenizer, which the output carries; put its tokenizer.json there")


def _write(plan: Plan, unfinished: Unfinished, max_shard_size: int | str) -> None:
    folder = unfinished.folder
    write_shards(plan, unfinished, max_shard_size)
    config = plan.config.to_dict() | {"architectures": ["ZooForCausalLM"]}
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)
    carry(plan.source.checkpoint.path, folder)


def carry(source: Path, folder: Path) -> None:
    """Copy the tokenizer, the licence and the generation config of a checkpoint directory."""
    for pattern in CARRIED_FILES:
        for file in sorted(source.glob(pattern)):
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
    _name_tokenizer(source, folder)


def _name_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer's class down where only the source's model_type told it."""
    from transformers import AutoTokenizer

    file = folder / "tokenizer_config.json"
    config = read_json(file, "tokenizer config") if file.is_file() else {}
    if "tokenizer_class" not in config:
        name = type(AutoTokenizer.from_pretrained(source)).__name__
        write_json(file, {**config, "tokenizer_class": name})


def _record(plan: Plan, source: str, path: Path, mixer: str | None, layout: str | None) -> dict[str, Any]:
    return {
        "format_version": 1,
        "source": {"name": source, "revision": revision_of(path), "format": plan.source.format},
        "mixer": mixer,
        "layout": layout,
        "keep": [index for index in range(len(plan.source.decoder.layers)) if index not in plan.swaps],
        "swaps": [{"layer": index, "mixer": swap.mixer, "args": dict(swap.args)} for index, swap in plan.swaps.items()],
        "seed": plan.seed,
        "rope": plan.rope,
        "measured": {str(index): dict(numbers) for index, numbers in plan.measured.items()},
        "transferred": plan.transferred,
        "new": plan.new,
        "plan": [row.to_dict() for row in plan.rows],
        "versions": versions(),
    }


def revision_of(path: Path) -> str | None:
    """The commit of a hub snapshot, from its place in the cache; None for a plain directory."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None
