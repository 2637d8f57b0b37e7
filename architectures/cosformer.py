"""cosFormer (Qin et al. 2022, arXiv 2202.08791): ReLU attention weighed by the cosine of the distance, throughout."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=4, intermediate_size=128),
    "340m": dict(vocab_size=32000, hidden_size=1024, depth=24, heads=16, intermediate_size=2816),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of cosFormer and SwiGLU; the weights fall to 0 at a distance of `max_position_embeddings`."""
    return uniform(
        "cosformer",
        dict(heads=heads, head_dim=hidden_size // heads, max_distance=max_position_embeddings),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
