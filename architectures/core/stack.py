"""Decoders of one layer repeated: what architectures that use one mixer throughout are made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm, Rope


def uniform(
    mixer: str,
    mixer_args: Mapping[str, Any],
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    intermediate_size: int | None = None,
    channel: str = "swiglu",
    channel_args: Mapping[str, Any] | None = None,
    block: str = "pre_norm",
    norm: Norm | None = None,
    embed: Embed | None = None,
    tied: bool = True,
    ropes: Mapping[str, Rope] | None = None,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of `mixer` and `channel`; without `intermediate_size` and `channel_args` there is no channel."""
    arguments = dict(channel_args or {})
    if intermediate_size is not None:
        arguments["intermediate_size"] = intermediate_size
    layer = Layer(
        mixer=mixer,
        mixer_args=mixer_args,
        channel=channel if arguments else None,
        channel_args=arguments,
        block=block,
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(layer,) * depth,
        embed=embed or Embed(),
        head=Head(tied=tied),
        norm=norm or Norm(),
        ropes=ropes or {},
        max_position_embeddings=max_position_embeddings,
    )


def by_layer(decoder: DecoderConfig, **arguments: Sequence[Any]) -> DecoderConfig:
    """`decoder` with mixer arguments that differ from layer to layer, one value per layer each."""
    layers = []
    for index, layer in enumerate(decoder.layers):
        own = {name: values[index] for name, values in arguments.items()}
        layers.append(replace(layer, mixer_args={**layer.mixer_args, **own}))
    return replace(decoder, layers=tuple(layers))
