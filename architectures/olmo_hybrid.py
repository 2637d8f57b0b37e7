"""Olmo Hybrid (Ai2 2026): three Gated DeltaNet layers with negative eigenvalues, then one of softmax attention.

Linear layers are normalised before their branches, as is usual; softmax layers after them, and their queries and keys
over all heads at once. The published model has no positions. The format is that of transformers' `olmo_hybrid`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core import delta_hybrid
from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.operations import Operation
from zoo.architectures.core.published import confirm, head_rule, linear_rules, part_of, rope_parameters
from zoo.architectures.core.published import rope as read_rope
from zoo.architectures.core.rules import Rule, alias, depthwise, rename, within
from zoo.errors import ZooError

ARCHITECTURE = "olmo_hybrid"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=2,
        heads=4,
        kv_heads=2,
        linear=dict(heads=4, head_dim=12, value_heads=4, value_dim=24),
        intermediate_size=128,
        attention_layers=(1,),
    ),
    "7b": dict(
        vocab_size=100352,
        hidden_size=3840,
        depth=32,
        heads=30,
        kv_heads=30,
        linear=dict(heads=30, head_dim=96, value_heads=30, value_dim=192),
        intermediate_size=11008,
    ),
}
PARAMETERS = {"7b": 7_430_870_688}  # transformers' class of the published config
BIASES = ("q_bias", "k_bias", "v_bias", "o_bias")


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    linear: Mapping[str, Any],
    intermediate_size: int,
    negative_eigenvalues: bool = True,
    attention_layers: Sequence[int] | None = None,
    attention_bias: bool = False,
    rope: Rope | None = None,
    norm_eps: float = 1e-6,
    tied: bool = False,
    max_position_embeddings: int = 65536,
) -> DecoderConfig:
    """`depth` layers of `gated_delta_net` with arguments `linear`, but attention in every fourth one, or those at the
    indices `attention_layers`; without `rope` it has no positions."""
    chosen = range(3, depth, 4) if attention_layers is None else attention_layers
    attention: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": hidden_size // heads}
    attention |= {"rope": "default" if rope else None, "qk_norm": "rms", "qk_norm_full": True, "qk_norm_eps": norm_eps}
    attention |= dict.fromkeys(BIASES, attention_bias)
    delta = {**linear, "beta_scale": 2.0 if negative_eigenvalues else 1.0, "norm_eps": 1e-5}
    channel: dict[str, Any] = {"channel": "swiglu", "channel_args": {"intermediate_size": intermediate_size}}
    softmax_layer = Layer(mixer="attention", mixer_args=attention, block="post_norm", **channel)
    linear_layer = Layer(mixer="gated_delta_net", mixer_args=delta, **channel)
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(softmax_layer if i in chosen else linear_layer for i in range(depth)),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": rope} if rope else {},
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "olmo_hybrid"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules. A softmax layer is read under the names that the hub has, and those that transformers saves."""
    layer = "model.layers.{i}."
    kinds = delta_hybrid.layer_types(config, default_types(config["num_hidden_layers"]))
    linear, softmax = (
        [i for i, k in enumerate(kinds) if k == kind] for kind in (delta_hybrid.LINEAR, delta_hybrid.SOFTMAX)
    )
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    parts = {"A_log": "A_log", "dt_bias": "dt_bias", "o_norm.weight": "o_norm"}
    return (
        rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
        rename("model.norm.weight", "model.norm.weight"),
        head_rule(bool(config.get("tie_word_embeddings", False))),
        *linear_rules(layer + "mlp.", layer + "channel.", ("gate_proj", "up_proj", "down_proj")),
        *within(
            softmax,
            (
                *linear_rules(layer + "self_attn.", layer + "mixer.", names),
                *(rename(f"{layer}self_attn.{n}.weight", f"{layer}mixer.{n}.weight") for n in ("q_norm", "k_norm")),
                rename(layer + "post_attention_layernorm.weight", layer + "mixer_norm.weight"),
                alias(rename(layer + "feedforward_layer_norm.weight", layer + "mixer_norm.weight")),
                rename(layer + "post_feedforward_layernorm.weight", layer + "channel_norm.weight"),
            ),
        ),
        *within(
            linear,
            (
                *linear_rules(layer + "linear_attn.", layer + "mixer.", (*names, "a_proj", "b_proj", "g_proj")),
                *(rename(f"{layer}linear_attn.{theirs}", f"{layer}mixer.{ours}") for theirs, ours in parts.items()),
                convolutions(layer + "linear_attn.", layer + "mixer.convs.", read_linear(config)),
                rename(layer + "attention_layer_norm.weight", layer + "mixer_norm.weight"),
                rename(layer + "feedforward_layer_norm.weight", layer + "channel_norm.weight"),
            ),
        ),
    )


def convolutions(theirs: str, ours: str, args: Mapping[str, Any]) -> Rule:
    """Three convolutions to three: transformers cuts them into equal parts when it saves, whatever belongs together."""
    keys, values = delta_hybrid.widths(args)
    sources, targets = [f"{theirs}{n}_conv1d.weight" for n in "qkv"], [f"{ours}{n}" for n in "qkv"]
    whole = depthwise("", targets, (keys, keys, values))
    joined = (Operation("concat", {"dim": 0}),)
    forward = tuple((*joined, *chain) for chain in whole.forward)
    stops = (keys, 2 * keys, 2 * keys + values)
    cuts = (Operation("slice", {"dim": 0, "start": a, "stop": b}) for a, b in zip((0, *stops), stops, strict=False))
    return Rule(tuple(sources), tuple(targets), forward, tuple((*whole.backward[0], cut) for cut in cuts))


def default_types(depth: int) -> list[str]:
    """Softmax attention in every fourth layer, at least in the last."""
    return delta_hybrid.every(4, depth) if depth >= 4 else [*delta_hybrid.every(4, depth)[:-1], delta_hybrid.SOFTMAX]


def read_linear(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of `gated_delta_net`."""
    heads = config["num_attention_heads"]
    keys = config.get("linear_num_key_heads") or heads
    key_dim = config.get("linear_key_head_dim") or int(0.75 * config["hidden_size"] / keys)
    defaults = {"linear_num_key_heads": heads, "linear_num_value_heads": heads, "linear_key_head_dim": key_dim}
    defaults |= {"linear_value_head_dim": 2 * key_dim, "linear_conv_kernel_dim": 4}
    return delta_hybrid.linear_args(config, defaults)


def read_positions(config: Mapping[str, Any]) -> Rope | None:
    """The rotary table; None where the base is given as null."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if given.get("rope_theta", config.get("rope_theta", 10000.0)) is None:
        return None
    return read_rope(config, config["hidden_size"] // config["num_attention_heads"])


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for an Olmo Hybrid `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    kinds = delta_hybrid.layer_types(config, default_types(config["num_hidden_layers"]))
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=len(kinds),
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        linear=read_linear(config),
        intermediate_size=config["intermediate_size"],
        negative_eigenvalues=bool(config.get("linear_allow_neg_eigval", True)),
        attention_layers=[i for i, kind in enumerate(kinds) if kind == delta_hybrid.SOFTMAX],
        attention_bias=bool(config.get("attention_bias", False)),
        rope=read_positions(config),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings", 65536),
    )


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Olmo Hybrid `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Olmo Hybrid cannot express.
    """
    kinds = delta_hybrid.types_of(decoder, "gated_delta_net", "attention")
    linear, channel = part_of(decoder, "mixers", "gated_delta_net"), part_of(decoder, "channels", "swiglu")
    if linear is None or channel is None:
        raise ZooError("Olmo Hybrid needs layers of gated_delta_net, and swiglu channels; save as zoo")
    attention, table = part_of(decoder, "mixers", "attention"), decoder.ropes.get("default")
    result = {
        **config,
        "model_type": "olmo_hybrid",
        "architectures": ["OlmoHybridForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "attention_bias": attention.q_bias,
        **delta_hybrid.linear_fields(linear),
        "linear_allow_neg_eigval": linear.beta_scale == 2.0,
        "intermediate_size": channel.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
        "rope_parameters": rope_parameters(table) if table else {"rope_type": "default", "rope_theta": None},
    }
    return confirm(result, decoder, _decoder)
