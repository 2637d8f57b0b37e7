"""Longhorn (Liu et al. 2024, arXiv 2407.14207) throughout, in layers without a channel, as Mamba's."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=3, inner=96, state_dim=8),
    "130m": dict(vocab_size=50304, hidden_size=768, depth=24),
    "1b3": dict(vocab_size=50304, hidden_size=2048, depth=48),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    inner: int | None = None,
    state_dim: int = 16,
    conv: int = 4,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of Longhorn; `inner` (None: twice the hidden size) channels with `state_dim` states each."""
    return uniform(
        "longhorn",
        dict(inner=inner or 2 * hidden_size, state_dim=state_dim, conv=conv),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        norm=Norm(eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
