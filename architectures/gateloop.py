"""GateLoop (Katsch 2023, arXiv 2311.01927) throughout: a state that decays and turns as the data say."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=4, intermediate_size=128),
    "tiny_many": dict(vocab_size=256, hidden_size=64, depth=2, heads=64, intermediate_size=128),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    intermediate_size: int,
    heads: int | None = None,
    gate: str | None = "silu",
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of GateLoop and SwiGLU; `heads` None makes a head of every channel, as published."""
    return uniform(
        "gateloop",
        dict(heads=heads or hidden_size, head_dim=hidden_size // (heads or hidden_size), gate=gate),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
