"""Linear Transformer (Katharopoulos et al. 2020, arXiv 2006.16236): attention with the kernel of elu + 1 throughout."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm, Rope
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
    rope_theta: float | None = 10000.0,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of linear attention and SwiGLU; queries and keys carry RoPE unless `rope_theta` is None."""
    head_dim = hidden_size // heads
    rotary = rope_theta is not None
    return uniform(
        "linear_transformer",
        dict(heads=heads, head_dim=head_dim, rope="default" if rotary else None),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        ropes={"default": Rope(dim=head_dim, theta=rope_theta)} if rope_theta is not None else {},
        max_position_embeddings=max_position_embeddings,
    )
