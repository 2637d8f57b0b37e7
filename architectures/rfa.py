"""Random feature attention (Peng et al. 2021, arXiv 2103.02143): random Fourier features of unit queries and keys
throughout, with other features in every layer; gated unless told otherwise (RFA-Gate, the paper's language model)."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm, Rope
from zoo.architectures.core.stack import by_layer, uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=4, intermediate_size=128, features=32),
    "tiny_plain": dict(
        vocab_size=256, hidden_size=64, depth=2, heads=4, intermediate_size=128, features=32, gated=False
    ),
    "340m": dict(vocab_size=32000, hidden_size=1024, depth=24, heads=16, intermediate_size=2816),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    features: int = 64,
    gated: bool = True,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of `features` sines and cosines per head, and SwiGLU; without `gated`, queries and keys carry
    RoPE (a gate tells distances by itself)."""
    head_dim = hidden_size // heads
    decoder = uniform(
        "rfa",
        dict(heads=heads, head_dim=head_dim, features=features, gated=gated, rope=None if gated else "default"),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        ropes={} if gated else {"default": Rope(dim=head_dim, theta=rope_theta)},
        max_position_embeddings=max_position_embeddings,
    )
    return by_layer(decoder, seed=range(depth))
