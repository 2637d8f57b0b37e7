"""The canonical softmax decoder: pre-norm, RMSNorm, grouped-query attention with RoPE, SwiGLU (Touvron et al. 2023,
arXiv 2302.13971)."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=4, heads=4, kv_heads=2, intermediate_size=128),
    "125m": dict(vocab_size=32000, hidden_size=768, depth=12, heads=12, kv_heads=4, intermediate_size=2048),
    "1b3": dict(vocab_size=32000, hidden_size=2048, depth=24, heads=32, kv_heads=8, intermediate_size=5632),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of softmax attention and SwiGLU."""
    head_dim = head_dim or hidden_size // heads
    attention = dict(heads=heads, kv_heads=kv_heads or heads, head_dim=head_dim, rope="default")
    layer = Layer(
        mixer="attention",
        mixer_args=attention,
        channel="swiglu",
        channel_args=dict(intermediate_size=intermediate_size),
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(layer,) * depth,
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": Rope(dim=head_dim, theta=rope_theta)},
        max_position_embeddings=max_position_embeddings,
    )
