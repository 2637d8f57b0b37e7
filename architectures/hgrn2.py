"""HGRN2 (Qin et al. 2024, arXiv 2404.07904) throughout: gated linear attention whose key is what is forgotten."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.lower_bounds import rising
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=2, intermediate_size=128),
    # the shapes of flash-linear-attention's 1.3B and 2.7B models: keys of 128
    "1b3": dict(vocab_size=32000, hidden_size=2048, depth=24, heads=16, intermediate_size=5632, tied=False),
    "2b7": dict(vocab_size=32000, hidden_size=2560, depth=32, heads=20, intermediate_size=6912, tied=False),
}
# Computed from those shapes: the paper names its models 1.3B and 2.7B.
PARAMETERS = {"1b3": 1_365_000_000, "2b7": 2_701_000_000}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    intermediate_size: int,
    heads: int = 1,
    gate: str | None = None,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of HGRN2 and SwiGLU; keys and values have the hidden size together."""
    return rising(
        uniform(
            "hgrn2",
            dict(heads=heads, head_dim=hidden_size // heads, gate=gate),
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            depth=depth,
            intermediate_size=intermediate_size,
            norm=Norm(eps=norm_eps),
            tied=tied,
            max_position_embeddings=max_position_embeddings,
        )
    )
