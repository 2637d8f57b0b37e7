"""Gated slot attention (Zhang et al. 2024, arXiv 2409.07146) throughout: softmax over slots that forget by a gate."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=2, intermediate_size=128, slots=16),
    # fla-hub/gsa-1.3B-100B and fla-hub/gsa-2.7B-100B
    "1b3": dict(vocab_size=32000, hidden_size=2048, depth=24, heads=4, intermediate_size=5632, tied=False),
    "2b7": dict(vocab_size=32000, hidden_size=2560, depth=32, heads=5, intermediate_size=6912, tied=False),
}
# Computed from the published config of 2.7B, and for 1.3B from the same ratios.
PARAMETERS = {"1b3": 1_377_000_000, "2b7": 2_727_600_000}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    slots: int = 64,
    norm_weight: bool = False,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of `slots` slots per head, and SwiGLU; `norm_weight` is that of the norm on the heads' output."""
    return uniform(
        "gsa",
        dict(heads=heads, head_dim=hidden_size // heads, slots=slots, norm_weight=norm_weight, norm_eps=norm_eps),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
