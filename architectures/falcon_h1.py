"""Falcon-H1 (Zuo et al. 2025, arXiv 2507.22448): attention and Mamba-2 side by side in every layer, then SwiGLU.

Fixed multipliers scale the embedding, each branch's input and output, the keys, the five parts of Mamba-2's projection,
the gate and output of SwiGLU, and the logits. The format is that of transformers' `falcon_h1`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm, Rope
from zoo.architectures.core.mamba_rules import mamba2_args, mamba2_fields, mamba2_rules
from zoo.architectures.core.published import (
    confirm,
    head_rule,
    linear_rules,
    part_of,
    preimage,
    require,
    rope_parameters,
)
from zoo.architectures.core.published import rope as read_rope
from zoo.architectures.core.rules import Rule, rename
from zoo.architectures.mixers import attention as attention_mixer
from zoo.architectures.mixers import mamba2 as mamba2_mixer
from zoo.errors import ZooError

ARCHITECTURE = "falcon_h1"
MULTIPLIERS: dict[str, Any] = dict(
    embedding=1.0,
    lm_head=1.0,
    attention_in=1.0,
    attention_out=1.0,
    key=1.0,
    ssm_in=1.0,
    ssm_out=1.0,
    ssm=(1.0,) * 5,
    mlp=(1.0, 1.0),
)


def _size(
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    vocab_size: int,
    mamba: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    given: dict[str, Any] = dict(
        vocab_size=vocab_size, hidden_size=hidden_size, depth=depth, heads=heads, kv_heads=2, head_dim=128
    )
    given |= dict(intermediate_size=intermediate_size, rope_theta=1e11, max_position_embeddings=131072)
    return {**given, "mamba": {**mamba, "norm": False}, **more}


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        mamba=dict(heads=4, head_dim=16, state_dim=16, norm_before_gate=True),
        multipliers=dict(
            embedding=2.0, lm_head=0.5, attention_out=0.9, key=0.4, ssm_in=1.25, ssm=(0.7, 0.5, 0.7, 1, 2)
        ),
    ),
    "0.5b": _size(
        1024,
        36,
        8,
        2048,
        32784,
        dict(heads=24, head_dim=64, state_dim=128),
        head_dim=64,
        max_position_embeddings=16384,
        multipliers=dict(
            embedding=5.656854249492381,
            lm_head=0.0390625,
            attention_out=0.9375,
            key=0.39062499999999994,
            ssm_in=1.25,
            ssm_out=0.23570226039551587,
            ssm=(0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738),
            mlp=(0.8838834764831844, 0.5859375),
        ),
    ),
    "1.5b": _size(2048, 24, 8, 4608, 65537, dict(heads=48, head_dim=64, state_dim=256)),
    "1.5b_deep": _size(1280, 66, 6, 3072, 65537, dict(heads=24, head_dim=64, state_dim=256)),
    "3b": _size(2560, 32, 10, 6144, 65537, dict(heads=32, head_dim=128, state_dim=256)),
    "7b": _size(3072, 44, 12, 12288, 130049, dict(heads=24, head_dim=128, state_dim=256)),
    "34b": _size(5120, 72, 20, 21504, 261120, dict(heads=32, head_dim=128, state_dim=256, groups=2), kv_heads=4),
}
# the technical report's table (0.52B, 1.55B, 1.55B, 3.15B, 7.59B, 33.6B)
PARAMETERS = {
    "0.5b": 521_411_104,
    "1.5b": 1_554_000_000,
    "1.5b_deep": 1_554_000_000,
    "3b": 3_149_000_000,
    "7b": 7_585_000_000,
    "34b": 33_640_000_000,
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    mamba: Mapping[str, Any],
    multipliers: Mapping[str, Any] | None = None,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope_theta: float = 10000.0,
    rope: Rope | None = None,
    norm_eps: float = 1e-5,
    tied: bool = False,
    max_position_embeddings: int = 8192,
) -> DecoderConfig:
    """`depth` equal layers; `mamba` has the arguments of `mamba2`, `multipliers` those of `MULTIPLIERS` that are not 1.

    The keys' multiplier is part of the attention's scale; `rope` replaces the table that `rope_theta` gives.
    """
    m = {**MULTIPLIERS, **(multipliers or {})}
    if unknown := sorted(set(m) - set(MULTIPLIERS)):
        raise ZooError(f"multiplier {unknown[0]!r} is unknown; there are {', '.join(MULTIPLIERS)}")
    attention = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rope": "default"}
    attention |= dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias"), attention_bias)
    layer = Layer(
        mixer="parallel",
        mixer_args={
            "first": "attention",
            "first_args": {**attention, "scale": _scale(m["key"], head_dim)},
            "first_in": m["attention_in"],
            "first_out": m["attention_out"],
            "second": "mamba2",
            "second_args": {**mamba, "scales": tuple(m["ssm"])},
            "second_in": m["ssm_in"],
            "second_out": m["ssm_out"],
        },
        channel="scaled_swiglu",
        channel_args={
            "intermediate_size": intermediate_size,
            "bias": mlp_bias,
            "gate_scale": m["mlp"][0],
            "out_scale": m["mlp"][1],
        },
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(layer,) * depth,
        embed=Embed(scale=m["embedding"]),
        head=Head(tied=tied, scale=m["lm_head"]),
        norm=Norm(eps=norm_eps),
        ropes={"default": rope or Rope(dim=head_dim, theta=rope_theta)},
        max_position_embeddings=max_position_embeddings,
    )


def _scale(key_multiplier: float, head_dim: int) -> float:
    return key_multiplier * head_dim**-0.5


_LAYER = "model.layers.{i}."
RULES: tuple[Rule, ...] = (
    rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
    rename("model.final_layernorm.weight", "model.norm.weight"),
    rename(_LAYER + "input_layernorm.weight", _LAYER + "mixer_norm.weight"),
    rename(_LAYER + "pre_ff_layernorm.weight", _LAYER + "channel_norm.weight"),
    *linear_rules(_LAYER + "self_attn.", _LAYER + "mixer.first.", ("q_proj", "k_proj", "v_proj", "o_proj")),
    *linear_rules(_LAYER + "feed_forward.", _LAYER + "channel.", ("gate_proj", "up_proj", "down_proj")),
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "falcon_h1"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; the fused projections of Mamba-2 are split."""
    mamba = mamba2_rules(_LAYER + "mamba.", _LAYER + "mixer.second.", _mamba(config))
    return (*RULES, head_rule(bool(config.get("tie_word_embeddings", False))), *mamba)


def _mamba(config: Mapping[str, Any]) -> dict[str, Any]:
    args = mamba2_args({"mamba_d_ssm": 1024, **config})
    biases = ("z", "x", "B", "C", "dt") if config.get("mamba_proj_bias") else ()
    normed = bool(config.get("mamba_rms_norm", False))
    return {
        **args,
        "biases": (*biases, "out") if config.get("projectors_bias") else biases,
        "norm": normed,
        "norm_before_gate": normed and bool(config.get("mamba_norm_before_gate", True)),
        "norm_groups": args["groups"] if normed else 1,
    }


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Falcon-H1 `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    require(config, "hidden_act", ("silu", "swish"), "silu")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    single = ("attention_in", "attention_out", "key", "ssm_in", "ssm_out", "embedding", "lm_head")
    multipliers: dict[str, Any] = {name: _number(config.get(f"{name}_multiplier")) for name in single}
    multipliers["ssm"] = tuple(config.get("ssm_multipliers") or MULTIPLIERS["ssm"])
    multipliers["mlp"] = tuple(config.get("mlp_multipliers") or MULTIPLIERS["mlp"])
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        depth=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate_size=config["intermediate_size"],
        mamba=_mamba(config),
        multipliers=multipliers,
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        rope=read_rope(config, head_dim),
        norm_eps=config.get("rms_norm_eps", 1e-5),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings", 8192),
    )


def _number(value: float | None) -> float:
    return 1.0 if value is None else value


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Falcon-H1 `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Falcon-H1 cannot express.
    """
    both, channel = part_of(decoder, "mixers", "parallel"), part_of(decoder, "channels", "scaled_swiglu")
    if both is None or channel is None or (both.first, both.second) != ("attention", "mamba2"):
        raise ZooError("Falcon-H1 needs attention beside mamba2, and scaled_swiglu, in every layer; save as zoo")
    attention = attention_mixer.Attention.parse(both.first_args)
    mamba = mamba2_mixer.Mamba2.parse(both.second_args)
    head_dim = attention.head_dim
    scale = head_dim**-0.5 if attention.scale is None else attention.scale
    result = {
        **config,
        "model_type": "falcon_h1",
        "architectures": ["FalconH1ForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": head_dim,
        "attention_bias": attention.q_bias,
        "intermediate_size": channel.intermediate_size,
        "mlp_bias": channel.bias,
        "hidden_act": "silu",
        **mamba2_fields(mamba, decoder.hidden_size),
        "mamba_d_ssm": mamba.heads * mamba.head_dim,
        "mamba_rms_norm": mamba.norm,
        "mamba_norm_before_gate": mamba.norm_before_gate,
        "projectors_bias": "out" in mamba.biases,
        "rms_norm_eps": decoder.norm.eps,
        "embedding_multiplier": decoder.embed.scale,
        "lm_head_multiplier": decoder.head.scale,
        "attention_in_multiplier": both.first_in,
        "attention_out_multiplier": both.first_out,
        "key_multiplier": preimage(lambda key: _scale(key, head_dim), scale, scale * head_dim**0.5),
        "ssm_in_multiplier": both.second_in,
        "ssm_out_multiplier": both.second_out,
        "ssm_multipliers": list(mamba.scales or MULTIPLIERS["ssm"]),
        "mlp_multipliers": [channel.gate_scale, channel.out_scale],
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
        "rope_parameters": rope_parameters(decoder.ropes["default"]),
    }
    return confirm(result, decoder, _decoder)
