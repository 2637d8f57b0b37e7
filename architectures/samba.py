"""Samba (Ren et al. 2024, arXiv 2406.07522): Mamba, MLP, sliding-window attention, MLP, and again."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, depth=4, heads=4, kv_heads=2, intermediate_size=96, state_dim=8, window=8
    ),
    # Samba_421M and Samba_1.3B of github.com/microsoft/Samba, lit_gpt/config.py
    "421m": dict(
        vocab_size=32000, hidden_size=1536, depth=12, heads=12, intermediate_size=4096, max_position_embeddings=4096
    ),
    "1b3": dict(
        vocab_size=32000, hidden_size=2304, depth=18, heads=18, intermediate_size=6144, max_position_embeddings=4096
    ),
}
PARAMETERS = {"421m": 421_000_000}  # the name; that of 1.3B is too rounded to compare with


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    kv_heads: int | None = None,
    inner: int | None = None,
    state_dim: int = 16,
    conv: int = 4,
    window: int = 2048,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` mixers, each with SwiGLU: Mamba at even indices, at odd ones attention with RoPE over `window` keys."""
    mamba = dict(inner=inner or 2 * hidden_size, state_dim=state_dim, conv=conv)
    head_dim = hidden_size // heads
    attention = dict(heads=heads, kv_heads=kv_heads or heads, head_dim=head_dim, rope="default", window=window)
    channel: dict[str, Any] = dict(channel="swiglu", channel_args=dict(intermediate_size=intermediate_size))
    pair = (
        Layer(mixer="mamba", mixer_args=mamba, **channel),
        Layer(mixer="attention", mixer_args=attention, **channel),
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(pair[i % 2] for i in range(depth)),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": Rope(dim=head_dim, theta=rope_theta)},
        max_position_embeddings=max_position_embeddings,
    )
