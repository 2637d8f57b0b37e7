"""Long convolutions (after LKCA, Li et al. 2024, arXiv 2401.05738) throughout: one large kernel per channel."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, intermediate_size=128, kernel=16),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    intermediate_size: int,
    kernel: int = 1024,
    gate: str | None = None,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of long convolutions over `kernel` tokens and SwiGLU."""
    return uniform(
        "long_conv",
        dict(kernel=kernel, gate=gate),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
