"""AFT-Simple (Zhai et al. 2021, arXiv 2105.14103) throughout: a running average of values per channel."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, intermediate_size=128),
    # the width and depth of the paper's models of enwik8
    "enwik8": dict(vocab_size=256, hidden_size=256, depth=24, intermediate_size=1024),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    intermediate_size: int,
    attention_size: int | None = None,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of AFT-Simple and SwiGLU; `attention_size` (None: the hidden size) channels of the average."""
    return uniform(
        "aft",
        dict(attention_size=attention_size),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
