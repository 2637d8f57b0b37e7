"""YOCO, a decoder-decoder (Sun et al. 2024, arXiv 2405.05254): after a self-decoder with a constant state, keys and
values are made once, and every layer of the cross-decoder reads them."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm, Rope
from zoo.errors import ZooError

SIZES: dict[str, Any] = dict(vocab_size=256, hidden_size=64, depth=4, heads=4, kv_heads=2, intermediate_size=128)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(**SIZES, self_heads=2),
    "tiny_window": dict(**SIZES, window=8),
    "3b": dict(
        vocab_size=100288,
        hidden_size=3072,
        depth=26,
        heads=24,
        kv_heads=8,
        self_heads=24,
        intermediate_size=8192,
        max_position_embeddings=4096,
    ),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    kv_heads: int | None = None,
    self_heads: int | None = None,
    window: int | None = None,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-5,
    tied: bool = False,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """Half of the layers are gated retention with `self_heads`, or attention over `window` keys if that is given; the
    others are full attention to one set of keys and values with `kv_heads`.

    The first of these writes the set. Its norm stands for the published norm of keys and values, whose weights make no
    difference beside the projections that follow.
    """
    if depth < 2 or depth % 2:
        raise ZooError(f"depth was {depth}; it must be even: half of the layers are the self-decoder")
    full = dict(heads=heads, kv_heads=kv_heads or heads, head_dim=hidden_size // heads, rope="cross")
    channel: dict[str, Any] = dict(channel="swiglu", channel_args=dict(intermediate_size=intermediate_size))
    self_dim = hidden_size // (self_heads or heads)
    ropes = {"cross": Rope(dim=hidden_size // heads, theta=rope_theta, pairing="interleaved")}
    if window is None:
        ropes["self"] = Rope(dim=self_dim, theta=rope_theta, pairing="interleaved")
        args = dict(heads=self_heads or heads, head_dim=self_dim, rope="self", norm_eps=norm_eps)
        own = Layer(mixer="gated_retention", mixer_args=args, **channel)
    else:
        own = Layer(mixer="attention", mixer_args={**full, "window": window}, **channel)
    writer = Layer(mixer="attention", mixer_args={**full, "writes": "kv"}, **channel)
    reader = Layer(mixer="cross", mixer_args={**full, "kv": "kv"}, **channel)
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(*(own,) * (depth // 2), writer, *(reader,) * (depth // 2 - 1)),
        embed=Embed(scale=hidden_size**0.5),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes=ropes,
        max_position_embeddings=max_position_embeddings,
    )
