"""LongNet (Ding et al. 2023, arXiv 2307.02486): dilated attention, segments and dilations growing together."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm, Rope
from zoo.architectures.core.stack import uniform

SEGMENTS, DILATIONS = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=4, segments=(4, 8, 16), dilations=(1, 2, 4)),
    "125m": dict(vocab_size=50257, hidden_size=768, depth=12, heads=12),
    "2b7": dict(vocab_size=50257, hidden_size=2560, depth=32, heads=32),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    segments: tuple[int, ...] = SEGMENTS,
    dilations: tuple[int, ...] = DILATIONS,
    intermediate_size: int | None = None,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 32768,
) -> DecoderConfig:
    """`depth` layers of dilated attention with these branches, and a GELU channel."""
    args = dict(heads=heads, head_dim=hidden_size // heads, rope="default", segments=segments, dilations=dilations)
    return uniform(
        "dilated",
        args,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        channel="gelu_mlp",
        intermediate_size=intermediate_size or 4 * hidden_size,
        norm=Norm(kind="layer", eps=norm_eps),
        ropes={"default": Rope(dim=hidden_size // heads, theta=rope_theta)},
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
