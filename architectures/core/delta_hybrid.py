"""Hybrids of delta-rule layers and softmax attention: what their published configs and checkpoints have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.published import require
from zoo.architectures.mixers.gated_delta_net import Args
from zoo.errors import ZooError

LINEAR, SOFTMAX = "linear_attention", "full_attention"


def layer_types(config: Mapping[str, Any], default: Sequence[str]) -> tuple[str, ...]:
    """The kind of each layer: `layer_types`, or `default`.

    Raises:
        ZooError: a kind that is unknown, or a list of another length than the depth.
    """
    kinds, depth = tuple(config.get("layer_types") or default), config["num_hidden_layers"]
    if len(kinds) != depth or set(kinds) - {LINEAR, SOFTMAX}:
        raise ZooError(f"layer_types was {list(kinds)}; it must name {LINEAR} or {SOFTMAX} for each of {depth} layers")
    return kinds


def types_of(decoder: DecoderConfig, linear: str, softmax: str) -> list[str]:
    """The way back from `layer_types`; the mixers `linear` and `softmax` are the two kinds.

    Raises:
        ZooError: a layer of another mixer, or no softmax layer (without one, transformers cannot decode).
    """
    kinds = {linear: LINEAR, softmax: SOFTMAX}
    if found := {layer.mixer for layer in decoder.layers} - set(kinds):
        raise ZooError(f"layers of {found.pop()} have no place in this format; it has {linear} and {softmax}")
    if all(layer.mixer == linear for layer in decoder.layers):
        raise ZooError(f"this format needs at least one layer of {softmax}; save as zoo")
    return [kinds[str(layer.mixer)] for layer in decoder.layers]


def every(interval: int, depth: int) -> list[str]:
    """Softmax attention in each `interval`-th layer."""
    return [LINEAR if (index + 1) % interval else SOFTMAX for index in range(depth)]


def linear_args(config: Mapping[str, Any], defaults: Mapping[str, int]) -> dict[str, Any]:
    """Sizes of `gated_delta_net` in a config with fields `linear_num_key_heads`, ...; `defaults` are transformers'."""
    require(config, "hidden_act", ("silu", "swish"), "silu")  # it is that of the convolutions too
    sizes = {name: defaults[name] if config.get(name) is None else config[name] for name in FIELDS}
    return {ours: sizes[theirs] for theirs, ours in FIELDS.items()}


def linear_fields(args: Args | None) -> dict[str, Any]:
    """The way back from `linear_args`, of typed arguments (None: there is no such layer)."""
    if args is None:
        return {}
    filled = {"value_heads": args.value_heads or args.heads, "value_dim": args.value_dim or args.head_dim}
    return {theirs: filled.get(ours, getattr(args, ours)) for theirs, ours in FIELDS.items()}


def widths(args: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of the keys and of the values of `linear_args`."""
    return args["heads"] * args["head_dim"], args["value_heads"] * args["value_dim"]


FIELDS = {
    "linear_num_key_heads": "heads",
    "linear_num_value_heads": "value_heads",
    "linear_key_head_dim": "head_dim",
    "linear_value_head_dim": "value_dim",
    "linear_conv_kernel_dim": "conv",
}
