"""MoBA (Lu et al. 2025, arXiv 2502.13189): mixture of block attention, with full attention in the last layers.

The layer-wise hybrid of the paper keeps the last layers full, so that every token of a fine-tuning loss gets gradients
from all of its context.
"""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=3,
        heads=4,
        kv_heads=2,
        intermediate_size=128,
        full_layers=1,
        block=16,
        blocks=2,
    ),
    "8b_1m": dict(
        vocab_size=128256,
        hidden_size=4096,
        depth=32,
        heads=32,
        kv_heads=8,
        intermediate_size=14336,
        block=4096,
        blocks=12,
        rope=Rope(dim=128, theta=500000.0, scaling=LLAMA31),
        norm_eps=1e-5,
        tied=False,
        max_position_embeddings=1048576,
    ),
}
PARAMETERS = {"8b_1m": 8_030_261_248}  # of Llama 3.1 8B, from which it was trained on


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    kv_heads: int | None = None,
    full_layers: int = 3,
    block: int = 512,
    blocks: int = 3,
    rope: Rope | None = None,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 8192,
) -> DecoderConfig:
    """`depth` layers whose queries read `blocks` blocks of `block` tokens each; the last `full_layers` read all."""
    sizes = dict(heads=heads, kv_heads=kv_heads, head_dim=hidden_size // heads, rope="default")
    channel: dict[str, Any] = dict(channel="swiglu", channel_args=dict(intermediate_size=intermediate_size))
    routed = Layer(mixer="moba", mixer_args={**sizes, "block": block, "budget": block * blocks}, **channel)
    full = Layer(mixer="attention", mixer_args=sizes, **channel)
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(routed,) * (depth - full_layers) + (full,) * full_layers,
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": rope or Rope(dim=hidden_size // heads)},
        max_position_embeddings=max_position_embeddings,
    )
