"""Gated DeltaNet and its hybrids (Yang et al. 2024, arXiv 2412.06464): delta-rule layers, optionally with softmax
attention every few layers (gated DeltaNet-H)."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=4, heads=2, head_dim=24, intermediate_size=128),
    "hybrid_tiny": dict(
        vocab_size=256, hidden_size=64, depth=4, heads=2, head_dim=24, intermediate_size=128, attention_every=4
    ),
    "1b3": dict(vocab_size=32000, hidden_size=2048, depth=21, heads=6, head_dim=256, intermediate_size=5632),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    head_dim: int,
    intermediate_size: int,
    expand_v: float = 2.0,
    conv: int = 4,
    attention_every: int | None = None,
    attention_heads: int | None = None,
    window: int | None = None,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers; with `attention_every = n`, each n-th is softmax attention (over `window` keys if given)."""
    linear = dict(heads=heads, head_dim=head_dim, value_dim=int(head_dim * expand_v), conv=conv)
    attention_heads = attention_heads or max(1, hidden_size // 64)
    softmax_dim = hidden_size // attention_heads
    softmax = dict(heads=attention_heads, head_dim=softmax_dim, rope="default", window=window)
    channel: dict[str, Any] = dict(channel="swiglu", channel_args=dict(intermediate_size=intermediate_size))

    def layer(index: int) -> Layer:
        if attention_every and (index + 1) % attention_every == 0:
            return Layer(mixer="attention", mixer_args=softmax, **channel)
        return Layer(mixer="gated_delta_net", mixer_args=linear, **channel)

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(i) for i in range(depth)),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": Rope(dim=softmax_dim)} if attention_every else {},
        max_position_embeddings=max_position_embeddings,
    )
