"""Phi-4-mini-flash (Ren et al. 2025, arXiv 2507.06607), a SambaY: Mamba and window layers, one full attention layer,
and layers that read its keys and values or the memory of the last Mamba layer."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm
from zoo.architectures.core.differential import lambda_start
from zoo.errors import ZooError

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, depth=8, heads=4, kv_heads=2, intermediate_size=128, window=8, state_dim=8
    ),
    "mini": dict(
        vocab_size=200064,
        hidden_size=2560,
        depth=32,
        heads=40,
        kv_heads=20,
        intermediate_size=10240,
        window=512,
        max_position_embeddings=262144,
    ),
}
# Bytes of the published 16-bit checkpoint's index (7,706,608,640), halved.
PARAMETERS = {"mini": 3_853_304_320}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    window: int,
    state_dim: int = 16,
    conv: int = 4,
    expand: int = 2,
    differential: bool = True,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers, even ones of the Mamba kind and odd ones of the attention kind, without positions.

    In the first half Mamba and attention over `window` keys; then a Mamba layer that writes its memory, the one full
    attention layer, which writes its keys and values, and gated memory units and cross attention that read them.
    """
    if depth < 8 or depth % 4:
        raise ZooError(f"depth was {depth}; it must be a multiple of 4 and at least 8")
    inner, half = expand * hidden_size, depth // 2
    channel: dict[str, Any] = dict(channel="swiglu", channel_args=dict(intermediate_size=intermediate_size))
    head = dict(heads=heads, kv_heads=kv_heads, head_dim=hidden_size // heads, q_bias=True, o_bias=True)

    def mamba(index: int) -> tuple[str, dict[str, Any]]:
        if index > half:
            return "gmu", dict(inner=inner, memory="memory")
        writes = {"writes": "memory"} if index == half else {}
        return "mamba", dict(inner=inner, state_dim=state_dim, conv=conv, **writes)

    def attention(index: int) -> tuple[str, dict[str, Any]]:
        args = {**head, "differential": lambda_start(index)} if differential else head
        if index > half + 1:
            return "cross", {**args, "kv": "kv"}
        args = {**args, "k_bias": True, "v_bias": True}
        return "attention", {**args, "writes": "kv"} if index > half else {**args, "window": window}

    kinds = (mamba(i) if i % 2 == 0 else attention(i) for i in range(depth))
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(Layer(mixer=mixer, mixer_args=args, **channel) for mixer, args in kinds),
        head=Head(tied=tied),
        norm=Norm(kind="layer", eps=norm_eps),
        max_position_embeddings=max_position_embeddings,
    )
