"""`zoo export`: a checkpoint for plain transformers."""

from __future__ import annotations

from pathlib import Path

from zoo.conversion.core.export.export import REMOTE, export


def run(model: str, out: Path, to: str, max_shard_size: str) -> str:
    """Export `model`, and say what was written."""
    made = export(model, out, to, max_shard_size=max_shard_size)
    if to == REMOTE:
        return f"wrote {out}: {made.architecture}, for trust_remote_code=True"
    found = "too large to be run here" if made.worst is None else f"logits within {made.worst:.1e} of ours"
    return f"wrote {out}: {made.architecture}, {found}"
