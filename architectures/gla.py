"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635) throughout, keys half as wide as values."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=2, intermediate_size=128),
    "340m": dict(vocab_size=32000, hidden_size=1024, depth=24, heads=4, intermediate_size=2816, tied=False),
    # fla-hub/gla-1.3B-100B and fla-hub/gla-2.7B-100B
    "1b3": dict(vocab_size=32000, hidden_size=2048, depth=24, heads=4, intermediate_size=5632, tied=False),
    "2b7": dict(vocab_size=32000, hidden_size=2560, depth=32, heads=5, intermediate_size=6912, tied=False),
}
# The hub's counts of linear-moe-hub/GLA-340M and bailin28/gla-1B-100B; that of 2.7B is computed from its config.
PARAMETERS = {"340m": 374_000_000, "1b3": 1_370_000_000, "2b7": 2_703_400_000}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    expand_k: float = 0.5,
    expand_v: float = 1.0,
    conv: int = 0,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of GLA and SwiGLU; keys and values have `expand_k` and `expand_v` times the hidden size."""
    width = hidden_size // heads
    return uniform(
        "gla",
        dict(heads=heads, head_dim=int(width * expand_k), value_dim=int(width * expand_v), conv=conv),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
