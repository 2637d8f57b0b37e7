"""Any mix of mixers, straight from a layout string: `gla*2,gated_delta_net,attention(window=512)`."""

from __future__ import annotations

from typing import Any

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.layout import parse_layout
from zoo.errors import ZooError

SIZES: dict[str, Any] = dict(vocab_size=256, hidden_size=64, depth=4, heads=4, intermediate_size=128)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(layout="gla*2,gated_delta_net,attention(window=8)", **SIZES),
    "tiny_parts": dict(layout="mamba2(heads=8,head_dim=16,state_dim=16),hedgehog", **SIZES),
    "1b3": dict(
        layout="gated_delta_net*3,attention",
        vocab_size=32000,
        hidden_size=2048,
        depth=24,
        heads=16,
        intermediate_size=5632,
    ),
}


def layout(
    *,
    layout: str,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    channel: str = "swiglu",
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of the mixers that `layout` names in turn, each with a channel.

    A mixer takes its arguments from the string; sizes that are not in it follow from `hidden_size` and `heads`.

    Raises:
        ZooError: a layout that cannot be: an unknown mixer or argument, heads that do not divide, ...
    """
    if heads < 1 or hidden_size % heads:
        raise ZooError(f"heads was {heads}; it must divide hidden_size ({hidden_size})")
    layers = tuple(
        Layer(
            mixer=name,
            mixer_args={**registry.get("mixers", name, "MODULE").default_args(hidden_size, heads), **args},
            channel=channel,
            channel_args={"intermediate_size": intermediate_size},
        )
        for name, args in parse_layout(layout, depth)
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": Rope(dim=hidden_size // heads, theta=rope_theta)},
        max_position_embeddings=max_position_embeddings,
    )
