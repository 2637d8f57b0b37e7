"""Softmax decoders whose layers see a window or everything: what their published configs have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Rope
from zoo.architectures.core.published import require, rope
from zoo.architectures.mixers.attention import Args
from zoo.errors import ZooError

LOCAL, FULL = "sliding_attention", "full_attention"
BIASES = ("q_bias", "k_bias", "v_bias", "o_bias")
GELUS = {"gelu_pytorch_tanh": True, "gelu": False}  # by published name, whether it is the approximation by tanh


def every(period: int, depth: int) -> tuple[str, ...]:
    """Full attention in each `period`-th layer, a window in the others."""
    return tuple(LOCAL if (index + 1) % period else FULL for index in range(depth))


def layer_types(config: Mapping[str, Any], period: int) -> tuple[str, ...]:
    """The kind of each layer: `layer_types`, or each n-th full (`sliding_window_pattern`; missing: `period`).

    Raises:
        ZooError: a kind that is unknown, a list of another length than the depth, or a window that is missing.
    """
    depth = config["num_hidden_layers"]
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or period
    kinds = tuple(config.get("layer_types") or every(period, depth))
    if len(kinds) != depth or set(kinds) - {LOCAL, FULL}:
        raise ZooError(f"layer_types was {list(kinds)}; it must name {LOCAL} or {FULL} for each of {depth} layers")
    if LOCAL in kinds and not config.get("sliding_window"):
        raise ZooError(f"sliding_window was {config.get('sliding_window')!r}; layers of {LOCAL} need a window")
    return kinds


def whole_rope(config: Mapping[str, Any], head_dim: int, pairing: str = "half") -> Rope:
    """The rotary table of a format that rotates whole heads; a partial rotation is refused."""
    for given in (config, config.get("rope_parameters") or {}):
        fields = {"model_type": config.get("model_type"), **given}
        require(fields, "partial_rotary_factor", (1.0,), 1.0)
    return rope(config, head_dim, pairing)


def softmax_fields(decoder: DecoderConfig) -> dict[str, Any]:
    """The fields of a published config that say sizes, biases and windows, read off the layers of `decoder`.

    Raises:
        ZooError: a layer that is no softmax attention beside a channel with an `intermediate_size`.
    """
    for index, layer in enumerate(decoder.layers):
        if layer.mixer != "attention" or "intermediate_size" not in layer.channel_args:
            raise ZooError(f"layer {index} is {layer.mixer} and {layer.channel}; the format needs attention and an MLP")
    if not decoder.layers:
        raise ZooError("a decoder without layers has no published format")
    attention = arguments(decoder)
    first, windows = attention[0], {args.window for args in attention if args.window}
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads or first.heads,
        "head_dim": first.head_dim,
        "attention_bias": first.q_bias,
        "intermediate_size": decoder.layers[0].channel_args["intermediate_size"],
        "layer_types": [LOCAL if args.window else FULL for args in attention],
        **({"sliding_window": min(windows)} if windows else {}),
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
    }


def arguments(decoder: DecoderConfig) -> Sequence[Args]:
    """Typed arguments of the attention of each layer."""
    return [Args(**layer.mixer_args) for layer in decoder.layers]
