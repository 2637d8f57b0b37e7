"""Llama (Touvron et al. 2023, arXiv 2302.13971; Llama 3, arXiv 2407.21783) as transformers publishes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core import published as published_format
from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.rules import Rule, drop, rename
from zoo.errors import ZooError

ARCHITECTURE = "transformer"
MODEL_TYPES = ("llama",)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

_LAYER = "model.layers.{i}."
RULES: tuple[Rule, ...] = (
    rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
    rename("model.norm.weight", "model.norm.weight"),
    rename("lm_head.weight", "lm_head.weight"),
    rename(_LAYER + "input_layernorm.weight", _LAYER + "mixer_norm.weight"),
    rename(_LAYER + "post_attention_layernorm.weight", _LAYER + "channel_norm.weight"),
    *(rename(f"{_LAYER}self_attn.{p}.{w}", f"{_LAYER}mixer.{p}.{w}") for p in PROJECTIONS for w in ("weight", "bias")),
    *(
        rename(f"{_LAYER}mlp.{p}.{w}", f"{_LAYER}channel.{p}.{w}")
        for p in ("gate_proj", "up_proj", "down_proj")
        for w in ("weight", "bias")
    ),
    drop(_LAYER + "self_attn.rotary_emb.inv_freq"),
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") in MODEL_TYPES


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; a tied checkpoint may hold its embedding a second time, as the head."""
    if not config.get("tie_word_embeddings", False):
        return RULES
    copy = drop("lm_head.weight", same_as="model.embed_tokens.weight")
    return (*(rule for rule in RULES if rule.sources[0] != "lm_head.weight"), copy)


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Llama `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    published_format.require(config, "hidden_act", ("silu", "swish"), "silu")
    depth, width = config["num_hidden_layers"], config["hidden_size"]
    bias = bool(config.get("attention_bias", False))
    attention = {
        "heads": config["num_attention_heads"],
        "kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": config.get("head_dim") or width // config["num_attention_heads"],
        **{f"{name[0]}_bias": bias for name in PROJECTIONS},
        "rope": "default",
    }
    channel = {"intermediate_size": config["intermediate_size"], "bias": bool(config.get("mlp_bias", False))}
    layer = Layer(mixer="attention", mixer_args=attention, channel="swiglu", channel_args=channel)
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        layers=(layer,) * depth,
        head=Head(tied=bool(config.get("tie_word_embeddings", False))),
        norm=Norm(kind="rms", eps=config.get("rms_norm_eps", 1e-6)),
        ropes={"default": rope(config, attention["head_dim"])},
        max_position_embeddings=config.get("max_position_embeddings", 2048),
    )


def rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary table; a partial rotation is refused."""
    published_format.require(config, "partial_rotary_factor", (1.0,), 1.0)
    parameters = {"model_type": "llama", **(config.get("rope_parameters") or {})}
    published_format.require(parameters, "partial_rotary_factor", (1.0,), 1.0)
    return published_format.rope(config, head_dim)


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Llama `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Llama cannot express.
    """
    attention, channel = _uniform(decoder)
    table = decoder.ropes[attention["rope"]]
    result = {
        **config,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention.get("kv_heads") or attention["heads"],
        "head_dim": attention["head_dim"],
        "attention_bias": bool(attention.get("q_bias", False)),
        "mlp_bias": bool(channel.get("bias", False)),
        "intermediate_size": channel["intermediate_size"],
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
        "rope_parameters": published_format.rope_parameters(table),
    }
    return published_format.confirm(result, decoder, _decoder)


_decoder = decoder  # `published` has an argument of that name


def _uniform(decoder: DecoderConfig) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The arguments of the one attention and the one channel that all layers have."""
    first = decoder.layers[0] if decoder.layers else None
    if first is None or any(layer != first for layer in decoder.layers):
        raise ZooError("Llama needs the same layer throughout; save this hybrid as zoo")
    if first.mixer != "attention" or first.channel != "swiglu" or first.mixer_args.get("rope") is None:
        raise ZooError(
            f"Llama needs attention with RoPE and swiglu, not {first.mixer} and {first.channel}; save as zoo"
        )
    return first.mixer_args, first.channel_args
