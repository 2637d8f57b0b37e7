"""Titans (Behrouz et al. 2025, arXiv 2501.00663): attention beside a memory that learns as it reads, throughout."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm, Rope
from zoo.architectures.core.stack import uniform

TINY = dict(vocab_size=256, hidden_size=64, depth=2, heads=4, intermediate_size=128, memory_width=32, mini_batch=4)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(**TINY, variant="gate", window=8),
    "tiny_memory": dict(**TINY, variant="memory"),
    "tiny_layer": dict(**TINY, variant="layer", window=8),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    variant: str = "gate",
    persistent: int = 4,
    window: int | None = None,
    memory_width: int | None = 64,
    mini_batch: int = 16,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of Titans and SwiGLU; `variant` is memory (MAC), gate (MAG) or layer (MAL)."""
    head_dim = hidden_size // heads
    args: dict[str, Any] = dict(heads=heads, head_dim=head_dim, variant=variant, persistent=persistent, window=window)
    args |= dict(memory_width=memory_width, mini_batch=mini_batch, rope="default", conv=0 if variant == "memory" else 4)
    return uniform(
        "titans",
        args,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        ropes={"default": Rope(dim=head_dim, theta=rope_theta)},
        max_position_embeddings=max_position_embeddings,
    )
