"""The attention of Character.AI's models (company blog "Optimizing AI Inference at Character.AI", 2024): multi-query,
five local layers to a global one, keys and values shared between layers."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.linear import check_sizes

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=6,
        heads=4,
        intermediate_size=128,
        window=8,
        global_every=3,
        local_share=2,
        global_share=2,
    ),
    "1b": dict(vocab_size=32000, hidden_size=2048, depth=24, heads=16, intermediate_size=5632),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    kv_heads: int = 1,
    window: int = 1024,
    global_every: int = 6,
    local_share: int = 3,
    global_share: int = 2,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 8192,
) -> DecoderConfig:
    """`depth` layers, each `global_every`-th full and the others over `window` keys.

    `local_share` neighbouring local layers between two global ones use the keys and values of the first of them, and
    `global_share` global layers those of the first of them.
    """
    check_sizes(window=window, global_every=global_every, local_share=local_share, global_share=global_share)
    args = dict(heads=heads, kv_heads=kv_heads, head_dim=hidden_size // heads, rope="default")
    channel: dict[str, Any] = dict(channel="swiglu", channel_args=dict(intermediate_size=intermediate_size))

    def layer(index: int) -> Layer:
        block, place = divmod(index, global_every)
        if place == global_every - 1:
            group, place = divmod(block, global_share)
            name, own = f"global{group}", args
        else:
            group, place = divmod(place, local_share)
            name, own = f"local{block}_{group}", {**args, "window": window}
        if place == 0:
            return Layer(mixer="attention", mixer_args={**own, "writes": name}, **channel)
        return Layer(mixer="cross", mixer_args={**own, "kv": name}, **channel)

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(i) for i in range(depth)),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": Rope(dim=hidden_size // heads, theta=rope_theta)},
        max_position_embeddings=max_position_embeddings,
    )
