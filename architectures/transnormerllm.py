"""TransNormerLLM (Qin et al. 2023, arXiv 2307.14995): lightning attention, simple GLU, norms without weights.

The first layer turns queries and keys by learned angles (LRPE); the others tell distances by their decay alone."""

from __future__ import annotations

import math
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Norm
from zoo.architectures.core.stack import by_layer, uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=3, heads=2, intermediate_size=128),
    # OpenNLPLab/TransNormerLLM-385M and TransNormerLLM-1B
    "385m": dict(vocab_size=50272, hidden_size=1024, depth=24, heads=8, intermediate_size=2816),
    "1b": dict(vocab_size=64000, hidden_size=2048, depth=16, heads=16, intermediate_size=5632),
    # the paper's table, with the same ratio of the channel
    "7b": dict(vocab_size=64000, hidden_size=4096, depth=30, heads=32, intermediate_size=11264),
}
# 385M is the paper's; that of 1B is computed from the published config.
PARAMETERS = {"385m": 385_000_000, "1b": 1_020_266_496}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    slopes: str = "transnormerllm",
    lrpe_layers: int = 1,
    scale_embedding: bool = True,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers, the first `lrpe_layers` with LRPE.

    `slopes` is the rule of the decays: "transnormerllm" is the paper's, "minimax" that of the released code.
    """
    mixer = dict(heads=heads, head_dim=hidden_size // heads, slopes=slopes, depth=depth, value_activation=None)
    output = dict(gate="linear", norm_weight=False, norm_eps=norm_eps)
    decoder = uniform(
        "lightning",
        {**mixer, **output},
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        channel="sglu",
        intermediate_size=intermediate_size,
        norm=Norm(kind="rms_plain", eps=norm_eps),
        embed=Embed(scale=math.sqrt(hidden_size) if scale_embedding else 1.0),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
    return by_layer(decoder, layer_index=range(depth), lrpe=[index < lrpe_layers for index in range(depth)])
