"""gpt-oss (OpenAI 2025, arXiv 2508.10925): layers that see a window of 128 tokens alternate with full attention, both
with learned sink logits; every channel is a mixture of experts with a clamped SwiGLU. The format is transformers'
`gpt_oss`, also with its experts in MXFP4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.local_global import BIASES, FULL, LOCAL, layer_types, softmax_fields, whole_rope
from zoo.architectures.core.published import confirm, head_rule, linear_rules, part_of, require, rope_parameters
from zoo.architectures.core.rules import Rule, chain, interleave, rename, transpose
from zoo.errors import ZooError

ARCHITECTURE = "gpt_oss"
YARN = dict(
    rope_type="yarn",
    factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=4096,
)
_RELEASED = dict(
    vocab_size=201088, hidden_size=2880, heads=64, kv_heads=8, head_dim=64, intermediate_size=2880, top_k=4
)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        experts=4,
        top_k=2,
        window=8,
        max_position_embeddings=2048,
    ),
    "20b": dict(_RELEASED, depth=24, experts=32),
    "120b": dict(_RELEASED, depth=36, experts=128),
}
PARAMETERS = {"20b": 20_910_000_000, "120b": 116_830_000_000}  # table 1 of the model card, arXiv 2508.10925
# what transformers takes for a field that a config leaves out
DEFAULTS: dict[str, Any] = dict(
    num_hidden_layers=36,
    num_local_experts=128,
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    head_dim=64,
    num_attention_heads=64,
    num_key_value_heads=8,
    sliding_window=128,
    tie_word_embeddings=False,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    num_experts_per_tok=4,
    attention_bias=True,
    rope_theta=150000.0,
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    experts: int,
    top_k: int,
    window: int | None = 128,
    kinds: Sequence[str] | None = None,
    limit: float = 7.0,
    attention_bias: bool = True,
    rope: Rope | None = None,
    norm_eps: float = 1e-5,
    tied: bool = False,
    max_position_embeddings: int = 131072,
) -> DecoderConfig:
    """`depth` layers, the first with a window and each second with full attention, or as `kinds` (sliding_attention,
    full_attention) says; `limit` is that of the experts' SwiGLU."""
    attention = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope="default", sink_logits=True)
    attention |= dict.fromkeys(BIASES, attention_bias)
    moe = dict(
        experts=experts,
        top_k=top_k,
        intermediate_size=intermediate_size,
        router_bias=True,
        softmax_after=True,
        bias=True,
        limit=limit,
    )
    kinds = kinds or [FULL if index % 2 else LOCAL for index in range(depth)]
    layers = (
        Layer(
            mixer="attention",
            mixer_args=attention | ({"window": window} if kind == LOCAL else {}),
            channel="moe",
            channel_args=moe,
        )
        for kind in kinds
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layers),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": rope or Rope(dim=head_dim, theta=150000.0, scaling=YARN)},
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "gpt_oss"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules. Experts are published with inputs before outputs, and gates and ups in turn."""
    config = {**DEFAULTS, **config}
    theirs, ours, rows = "model.layers.{i}.", "model.layers.{i}.", 2 * config["intermediate_size"]
    experts, stacked = theirs + "mlp.experts.", ours + "channel.experts."
    return (
        rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
        rename("model.norm.weight", "model.norm.weight"),
        head_rule(bool(config["tie_word_embeddings"])),
        rename(theirs + "input_layernorm.weight", ours + "mixer_norm.weight"),
        rename(theirs + "post_attention_layernorm.weight", ours + "channel_norm.weight"),
        *linear_rules(theirs + "self_attn.", ours + "mixer.", PROJECTIONS),
        rename(theirs + "self_attn.sinks", ours + "mixer.sinks"),
        *linear_rules(theirs + "mlp.", ours + "channel.", ("router",)),
        chain(
            transpose(experts + "gate_up_proj", stacked + "gate_up_proj", (0, 2, 1)),
            interleave(stacked + "gate_up_proj", stacked + "gate_up_proj", rows, dim=1),
        ),
        interleave(experts + "gate_up_proj_bias", stacked + "gate_up_bias", rows, dim=1),
        transpose(experts + "down_proj", stacked + "down_proj", (0, 2, 1)),
        rename(experts + "down_proj_bias", stacked + "down_bias"),
    )


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a gpt-oss `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    config = {**DEFAULTS, **config}
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config["rope_parameters"] = dict(YARN)
    require(config, "hidden_act", ("silu", "swish"), "silu")
    require(config, "swiglu_limit", (7.0,), 7.0)  # transformers knows no other
    depth = config["num_hidden_layers"]
    alternating = [FULL if index % 2 else LOCAL for index in range(depth)]
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=depth,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate_size=config["intermediate_size"],
        experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        window=config["sliding_window"],
        kinds=layer_types({**config, "layer_types": config.get("layer_types") or alternating}, period=2),
        attention_bias=config["attention_bias"],
        rope=whole_rope(config, config["head_dim"]),
        norm_eps=config["rms_norm_eps"],
        tied=config["tie_word_embeddings"],
        max_position_embeddings=config["max_position_embeddings"],
    )


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The gpt-oss `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that gpt-oss cannot express.
    """
    fields, moe = softmax_fields(decoder), part_of(decoder, "channels", "moe")
    if moe is None or "default" not in decoder.ropes:
        raise ZooError("gpt-oss needs moe channels and a rotary table named default; save as zoo")
    result = {
        **config,
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        **fields,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm.eps,
        "rope_parameters": rope_parameters(decoder.ropes["default"]),
    }
    return confirm(result, decoder, _decoder)
