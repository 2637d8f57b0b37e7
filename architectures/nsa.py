"""NSA (Yuan et al. 2025, arXiv 2502.11089): native sparse attention, and mixtures of experts but for the first layer.

The paper's 27B model: 64 query heads share 4 KV heads, and 72 routed experts of which 6 are used stand beside 2 shared
ones. It publishes neither weights nor the widths of its experts and its first channel; those here make about 27B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
        value_dim=8,
        intermediate_size=128,
        experts=dict(experts=4, top_k=2, intermediate_size=32, shared_size=32),
        attention=dict(size=4, stride=2, block=16, window=8, budget=48),
    ),
    "27b": dict(
        vocab_size=129280,
        hidden_size=2560,
        depth=30,
        heads=64,
        kv_heads=4,
        head_dim=192,
        value_dim=128,
        intermediate_size=12288,
        experts=dict(experts=72, top_k=6, intermediate_size=1536, shared_size=3072),
        tied=False,
    ),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    value_dim: int | None = None,
    experts: Mapping[str, Any] | None = None,
    dense_layers: int = 1,
    attention: Mapping[str, Any] | None = None,
    rope: Rope | None = None,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 32768,
) -> DecoderConfig:
    """`depth` layers, of which the first `dense_layers` have a SwiGLU and the others `experts` (options of `moe`).

    `attention` are options of mixer `nsa`, the published ones by default.
    """
    sizes = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, rope="default")
    mixer: dict[str, Any] = dict(mixer="nsa", mixer_args={**sizes, **(attention or {})})
    dense = Layer(**mixer, channel="swiglu", channel_args=dict(intermediate_size=intermediate_size))
    mixed = dense if experts is None else Layer(**mixer, channel="moe", channel_args=dict(experts))
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(dense if index < dense_layers else mixed for index in range(depth)),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": rope or Rope(dim=head_dim)},
        max_position_embeddings=max_position_embeddings,
    )
