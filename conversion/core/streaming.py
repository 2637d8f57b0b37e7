"""The shards of a conversion, written one tensor at a time, with progress."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import zoo
from zoo.architectures.core.resumable import Unfinished
from zoo.architectures.core.shards import Spec, write_tensors
from zoo.conversion.core.planner import Plan


def write_shards(plan: Plan, unfinished: Unfinished, max_shard_size: int | str) -> None:
    """Write the shards that are not finished yet; on a terminal a bar shows how far it is."""
    specs = {row.target: Spec(row.shape, row.dtype) for row in plan.rows}
    ends = dict(zip(specs, accumulate(spec.nbytes for spec in specs.values()), strict=True))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=max(ends.values(), default=0))

        def get(name: str) -> Tensor:
            bar.update(task, completed=ends[name])
            return plan.tensor(name)

        write_tensors(unfinished.folder, specs, get, max_shard_size, unfinished)


def identity(plan: Plan, shard_size: int) -> dict[str, Any]:
    """All that decides the bytes of the shards, as JSON data, by a name that says what it is."""
    checkpoint = plan.source.checkpoint
    files = [checkpoint.path / "config.json", *checkpoint.files]
    layers = {f"layer {index}": f"{swap.mixer} {json.dumps(swap.args)}" for index, swap in plan.swaps.items()}
    rows = json.dumps([plan.config.to_dict(), *([row.to_dict(), str(row.init)] for row in plan.rows)])
    return {
        "source": str(checkpoint.path.absolute()),
        **{f"source file {file.name}": _stamp(file) for file in files},
        **layers,
        "seed": plan.seed,
        "max_shard_size": shard_size,
        **{f"version of {name}": version for name, version in versions().items()},
        "plan": hashlib.sha256(rows.encode()).hexdigest(),
    }


def _stamp(file: Path) -> str:
    stat = file.stat()
    return f"{stat.st_size} bytes, written at {stat.st_mtime_ns} ns"


def versions() -> dict[str, str]:
    """Of this library and of those that the result depends on."""
    return {"hybrid-zoo": zoo.__version__, **{name: metadata.version(name) for name in ("torch", "transformers")}}
