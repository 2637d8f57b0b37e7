"""Attention with bounded-memory control (Peng et al. 2021, arXiv 2110.02488) throughout: softmax over averaging
slots."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm, Rope
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=2, intermediate_size=128, slots=16),
    "340m": dict(vocab_size=32000, hidden_size=1024, depth=24, heads=16, intermediate_size=2816),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    slots: int = 64,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of `slots` slots per head over queries and keys with RoPE, and SwiGLU."""
    head_dim = hidden_size // heads
    return uniform(
        "abc",
        dict(heads=heads, head_dim=head_dim, slots=slots, rope="default"),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        ropes={"default": Rope(dim=head_dim, theta=rope_theta)},
        max_position_embeddings=max_position_embeddings,
    )
