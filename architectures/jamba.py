"""Jamba (Lieber et al. 2024, arXiv 2403.19887; Jamba-1.5, arXiv 2408.12570): Mamba with softmax attention every eight
layers, and a mixture of experts every two. No positions are encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core import published as published_format
from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm
from zoo.architectures.core.mamba_rules import mamba_rules
from zoo.architectures.core.published import expert_rules, head_rule, linear_rules, part_of, require
from zoo.architectures.core.rules import Rule, rename
from zoo.errors import ZooError

ARCHITECTURE = "jamba"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=4,
        heads=4,
        kv_heads=2,
        intermediate_size=96,
        attention_every=4,
        attention_offset=2,
        experts=4,
        state_dim=8,
    ),
    "52b": dict(  # ai21labs/Jamba-v0.1 and AI21-Jamba-1.5-Mini
        vocab_size=65536,
        hidden_size=4096,
        depth=32,
        heads=32,
        kv_heads=8,
        intermediate_size=14336,
        max_position_embeddings=262144,
    ),
    "398b": dict(  # AI21-Jamba-1.5-Large
        vocab_size=65536,
        hidden_size=8192,
        depth=72,
        heads=64,
        kv_heads=8,
        intermediate_size=24576,
        max_position_embeddings=262144,
    ),
}
# 51.6B of Jamba-v0.1's weights, 398B of Jamba-1.5-Large's card; exactly as transformers' class counts them
PARAMETERS = {"52b": 51570323328, "398b": 398555145696}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    head_dim: int | None = None,
    attention_every: int = 8,
    attention_offset: int = 4,
    experts: int = 16,
    top_k: int = 2,
    experts_every: int = 2,
    experts_offset: int = 1,
    inner: int | None = None,
    state_dim: int = 16,
    dt_rank: int | None = None,
    conv: int = 4,
    conv_bias: bool = True,
    bias: bool = False,
    norm_eps: float = 1e-6,
    tied: bool = False,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers: attention where the index is `attention_offset` modulo `attention_every`, Mamba elsewhere.

    Where the index is `experts_offset` modulo `experts_every`, the channel has `experts` (1: none), of which a token
    uses `top_k`; it is SwiGLU elsewhere. `inner`, `state_dim`, `dt_rank`, `conv`, `conv_bias` and `bias` are Mamba's.
    """
    mamba = dict(
        inner=inner or 2 * hidden_size,
        state_dim=state_dim,
        dt_rank=dt_rank or -(-hidden_size // 16),
        conv=conv,
        conv_bias=conv_bias,
        bias=bias,
        norm="rms",
        norm_eps=norm_eps,
    )
    attention = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim or hidden_size // heads)
    swiglu = dict(intermediate_size=intermediate_size)
    moe = dict(experts=experts, top_k=top_k, **swiglu)

    def layer(index: int) -> Layer:
        softmax = index % attention_every == attention_offset
        sparse = experts > 1 and index % experts_every == experts_offset
        return Layer(
            mixer="attention" if softmax else "mamba",
            mixer_args=attention if softmax else mamba,
            channel="moe" if sparse else "swiglu",
            channel_args=moe if sparse else swiglu,
        )

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(i) for i in range(depth)),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        max_position_embeddings=max_position_embeddings,
    )


_LAYER = "model.layers.{i}."
_CHANNEL = (_LAYER + "feed_forward.", _LAYER + "channel.")
RULES: tuple[Rule, ...] = (
    rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
    rename("model.final_layernorm.weight", "model.norm.weight"),
    rename(_LAYER + "input_layernorm.weight", _LAYER + "mixer_norm.weight"),
    rename(_LAYER + "pre_ff_layernorm.weight", _LAYER + "channel_norm.weight"),
    *linear_rules(_LAYER + "self_attn.", _LAYER + "mixer.", ("q_proj", "k_proj", "v_proj", "o_proj")),
    *mamba_rules(_LAYER + "mamba.", _LAYER + "mixer."),
    *linear_rules(*_CHANNEL, ("gate_proj", "up_proj", "down_proj", "router")),
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "jamba"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; experts are separate tensors on disk and one here."""
    experts = expert_rules(_CHANNEL[0] + "experts.", _CHANNEL[1], config.get("num_experts", 16))
    return *RULES, head_rule(bool(config.get("tie_word_embeddings", False))), *experts


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Jamba `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    require(config, "hidden_act", ("silu", "swish"), "silu")
    require(config, "sliding_window", (None,), None)
    require(config, "mamba_inner_layernorms", (True,), True)
    require(config, "mamba_d_conv", range(1, 1 << 16), 4)
    rank = config.get("mamba_dt_rank", "auto")
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        head_dim=config.get("head_dim"),
        attention_every=config.get("attn_layer_period", 8),
        attention_offset=config.get("attn_layer_offset", 4),
        experts=config.get("num_experts", 16),
        top_k=config.get("num_experts_per_tok", 2),
        experts_every=config.get("expert_layer_period", 2),
        experts_offset=config.get("expert_layer_offset", 1),
        inner=config.get("mamba_expand", 2) * config["hidden_size"],
        state_dim=config.get("mamba_d_state", 16),
        dt_rank=None if rank == "auto" else rank,
        conv=config.get("mamba_d_conv", 4),
        conv_bias=bool(config.get("mamba_conv_bias", True)),
        bias=bool(config.get("mamba_proj_bias", False)),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings", 262144),
    )


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Jamba `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Jamba cannot express.
    """
    attention, mamba = part_of(decoder, "mixers", "attention"), part_of(decoder, "mixers", "mamba")
    moe, swiglu = part_of(decoder, "channels", "moe"), part_of(decoder, "channels", "swiglu")
    if mamba is None or attention is None or not (moe or swiglu) or mamba.inner % decoder.hidden_size:
        raise ZooError("jamba needs layers of mamba (of a multiple of hidden_size) and attention, with moe or swiglu")
    attended = [i for i, layer in enumerate(decoder.layers) if layer.mixer == "attention"]
    sparse = [i for i, layer in enumerate(decoder.layers) if layer.channel == "moe"]
    result = {
        **config,
        "model_type": "jamba",
        "architectures": ["JambaForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim,
        "intermediate_size": (moe or swiglu).intermediate_size,
        "hidden_act": "silu",
        **_every("attn_layer", attended, len(decoder.layers)),
        **_every("expert_layer", sparse, len(decoder.layers)),
        "num_experts": moe.experts if moe else 1,
        "num_experts_per_tok": moe.top_k if moe else 1,
        "mamba_expand": mamba.inner // decoder.hidden_size,
        "mamba_d_state": mamba.state_dim,
        "mamba_dt_rank": mamba.dt_rank or "auto",
        "mamba_d_conv": mamba.conv,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
        "rms_norm_eps": decoder.norm.eps,
        "tie_word_embeddings": decoder.head.tied,
        "max_position_embeddings": decoder.max_position_embeddings,
    }
    return published_format.confirm(result, decoder, _decoder)


_decoder = decoder  # `published` has an argument of that name


def _every(name: str, indices: Sequence[int], depth: int) -> dict[str, int]:
    """Period and offset of evenly spaced layers; what else the indices may be, `confirm` refuses."""
    period = indices[1] - indices[0] if len(indices) > 1 else depth
    return {f"{name}_period": period, f"{name}_offset": indices[0] if indices else 0}
