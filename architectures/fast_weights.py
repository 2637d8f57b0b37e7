"""Fast weight programmer (Schlag et al. 2021, arXiv 2102.11174): DPFP features and the delta rule throughout."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=4, intermediate_size=128),
    # the widths of the paper's small and medium models of WikiText-103 (IDSIA/lmtool-fwp, example_scripts)
    "small": dict(vocab_size=267735, hidden_size=128, depth=16, heads=8, intermediate_size=2048, channel="gelu_mlp"),
    "medium": dict(vocab_size=267735, hidden_size=256, depth=16, heads=8, intermediate_size=2048, channel="gelu_mlp"),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    rule: str = "delta",
    nu: int = 1,
    channel: str = "swiglu",
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of fast weights and a channel; `rule` is delta or sum, `nu` sets the number of features."""
    return uniform(
        "fast_weights",
        dict(heads=heads, head_dim=hidden_size // heads, rule=rule, nu=nu),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        channel=channel,
        norm=Norm(eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
