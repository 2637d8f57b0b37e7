"""Where positions go in a conversion: RoPE in the new layers, in the kept ones, or nowhere.

- keep: every layer has the RoPE of the source.
- drop: the new layers have none; those that stay softmax attention keep it.
- hype: the new layers keep it; kept full attention loses it, and its logits at position p are multiplied by
  `1 + log(1 + floor((p + 1) / 500)) / log(500)` (HyPE, arXiv 2601.22156, whose `log(p + 500) / log(500)` has no steps).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.layout import overridden
from zoo.errors import ZooError

ROPES = ("keep", "drop", "hype")
GROWTH = 500  # tokens: the logarithm's base, and the steps in which it grows
UNTURNED: dict[str, Any] = {"rope": None, "temperature": (GROWTH, 1 / math.log(GROWTH))}


def check(rope: str, decoder: DecoderConfig) -> None:
    """Raise `ZooError` for an unknown `rope`, or one that changes a source without RoPE."""
    if rope not in ROPES:
        raise ZooError(f"rope was {rope!r}; it must be one of {', '.join(ROPES)}")
    if rope != "keep" and not any(layer.mixer_args.get("rope") for layer in decoder.layers):
        raise ZooError(f"rope was {rope!r}, and no layer of the source has RoPE; leave it at keep")


def arguments(rope: str, mixer: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the user has `given` to a new mixer, with what `rope` asks of it; what is given itself goes first."""
    cls = registry.get("mixers", mixer, "MODULE")
    options = {field.name for field in fields(cls.options)}
    asked: dict[str, Any] = {}
    if {"attention", "mixer_args"} <= options:  # softmax heads beside others
        inner = str(given.get("mixer", "gated_delta_net"))
        asked = {"attention": UNTURNED} if rope == "hype" else {"mixer_args": arguments(rope, inner, {})}
    elif rope == "drop" and "rope" in options and not cls.keeps_softmax:
        asked = {"rope": None}
    return overridden(asked, given)


def kept(rope: str, layer: Layer) -> Layer:
    """A layer that is not swapped."""
    local = layer.mixer_args.get("window") or layer.mixer_args.get("chunk")
    if rope != "hype" or layer.mixer != "attention" or local or not layer.mixer_args.get("rope"):
        return layer
    if layer.mixer_args.get("temperature"):
        raise ZooError("rope was 'hype', and the source's attention has a temperature of its own; leave rope at keep")
    return replace(layer, mixer_args={**layer.mixer_args, **UNTURNED})
