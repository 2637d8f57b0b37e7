"""Bamba (IBM, Princeton, CMU and UIUC 2024): Mamba-2 layers with softmax attention at a few depths, each with SwiGLU.

Half of each attention head is rotated. The format is that of transformers' `bamba`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.mamba_rules import mamba2_args, mamba2_fields, mamba2_rules
from zoo.architectures.core.published import confirm, head_rule, linear_rules, part_of, require, rope_parameters
from zoo.architectures.core.published import rope as read_rope
from zoo.architectures.core.rules import Rule, rename
from zoo.architectures.mixers.attention import Args as AttentionArgs
from zoo.errors import ZooError

ARCHITECTURE = "bamba"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=3,
        attention_layers=(1,),
        heads=4,
        kv_heads=2,
        intermediate_size=128,
        mamba=dict(heads=4, head_dim=32, state_dim=16),
    ),
    "9b": dict(
        vocab_size=128256,
        hidden_size=4096,
        depth=32,
        attention_layers=(9, 18, 27),
        heads=32,
        kv_heads=8,
        intermediate_size=14336,
        mamba=dict(heads=128, head_dim=64, state_dim=128),
        max_position_embeddings=4096,
    ),
}
PARAMETERS = {"9b": 9_780_000_000}  # the model card's 9.78B
BIASES = ("q_bias", "k_bias", "v_bias", "o_bias")


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    attention_layers: Sequence[int],
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    mamba: Mapping[str, Any],
    head_dim: int | None = None,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope: Rope | None = None,
    norm_eps: float = 1e-5,
    tied: bool = False,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of `mamba2` with arguments `mamba`, but attention at the indices `attention_layers`."""
    head_dim = head_dim or hidden_size // heads
    attention = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rope": "default"}
    attention |= dict.fromkeys(BIASES, attention_bias)
    channel = {"intermediate_size": intermediate_size, "bias": mlp_bias}
    mixers = ((("attention", attention) if i in attention_layers else ("mamba2", mamba)) for i in range(depth))
    layers = (Layer(mixer=name, mixer_args=args, channel="swiglu", channel_args=channel) for name, args in mixers)
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layers),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": rope or Rope(dim=head_dim // 2)} if attention_layers else {},
        max_position_embeddings=max_position_embeddings,
    )


_LAYER = "model.layers.{i}."
RULES: tuple[Rule, ...] = (
    rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
    rename("model.final_layernorm.weight", "model.norm.weight"),
    rename(_LAYER + "input_layernorm.weight", _LAYER + "mixer_norm.weight"),
    rename(_LAYER + "pre_ff_layernorm.weight", _LAYER + "channel_norm.weight"),
    *linear_rules(_LAYER + "self_attn.", _LAYER + "mixer.", ("q_proj", "k_proj", "v_proj", "o_proj")),
    *linear_rules(_LAYER + "feed_forward.", _LAYER + "channel.", ("gate_proj", "up_proj", "down_proj")),
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "bamba"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; the fused projections of Mamba-2 are split."""
    tied = bool(config.get("tie_word_embeddings", False))
    return (
        *RULES,
        head_rule(tied),
        *mamba2_rules(_LAYER + "mamba.", _LAYER + "mixer.", mamba2_args(config)),
    )


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Bamba `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    require(config, "hidden_act", ("silu", "swish"), "silu")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=config["num_hidden_layers"],
        attention_layers=tuple(config.get("attn_layer_indices") or ()),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate_size=config["intermediate_size"],
        mamba=mamba2_args(config),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        # transformers sets the top-level factor to a half, whatever the file says
        rope=read_rope({**config, "partial_rotary_factor": None}, head_dim, partial=0.5),
        norm_eps=config.get("rms_norm_eps", 1e-5),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
    )


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Bamba `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Bamba cannot express.
    """
    attention = part_of(decoder, "mixers", "attention") or AttentionArgs(heads=1, head_dim=decoder.hidden_size)
    mamba, channel = part_of(decoder, "mixers", "mamba2"), part_of(decoder, "channels", "swiglu")
    if mamba is None or channel is None:
        raise ZooError("Bamba needs layers of mamba2, and swiglu; save as zoo")
    result = {
        **config,
        "model_type": "bamba",
        "architectures": ["BambaForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "attn_layer_indices": [i for i, layer in enumerate(decoder.layers) if layer.mixer == "attention"],
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.q_bias,
        "intermediate_size": channel.intermediate_size,
        "mlp_bias": channel.bias,
        "hidden_act": "silu",
        **mamba2_fields(mamba, decoder.hidden_size),
        "rms_norm_eps": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
        "rope_parameters": rope_parameters(decoder.ropes.get("default") or Rope(dim=2), attention.head_dim),
    }
    return confirm(result, decoder, _decoder)
