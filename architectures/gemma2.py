"""Gemma 2 (Gemma Team 2024, arXiv 2408.00118): layers that see a window of 4096 tokens alternate with full attention.

Norms before and after each branch, soft-capped scores and logits. The format is that of transformers' `gemma2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm, Rope
from zoo.architectures.core.local_global import BIASES, FULL, GELUS, every, layer_types, softmax_fields, whole_rope
from zoo.architectures.core.published import confirm, head_rule, linear_rules, part_of, require, rope_parameters
from zoo.architectures.core.rules import Rule, rename
from zoo.errors import ZooError

ARCHITECTURE = "gemma2"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, depth=2, heads=4, kv_heads=2, head_dim=16, intermediate_size=128, window=8
    ),
    "2b": dict(
        vocab_size=256000, hidden_size=2304, depth=26, heads=8, kv_heads=4, head_dim=256, intermediate_size=9216
    ),
    "9b": dict(
        vocab_size=256000, hidden_size=3584, depth=42, heads=16, kv_heads=8, head_dim=256, intermediate_size=14336
    ),
    "27b": dict(
        vocab_size=256000,
        hidden_size=4608,
        depth=46,
        heads=32,
        kv_heads=16,
        head_dim=128,
        intermediate_size=36864,
        query_pre_attn_scalar=144,
    ),
}
# embedding and other parameters of the report's table 2
PARAMETERS = {
    "2b": 590_118_912 + 2_024_517_888,
    "9b": 917_962_752 + 8_324_201_984,
    "27b": 1_180_237_824 + 26_047_480_320,
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
    window: int | None = 4096,
    kinds: Sequence[str] | None = None,
    query_pre_attn_scalar: int | None = None,
    attention_bias: bool = False,
    score_softcap: float | None = 50.0,
    logit_softcap: float | None = 30.0,
    tanh: bool = True,
    rope: Rope | None = None,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 8192,
) -> DecoderConfig:
    """`depth` layers, each second with full attention, or as `kinds` (sliding_attention, full_attention) says.

    Scores are divided by the root of `query_pre_attn_scalar` (None: `head_dim`).
    """
    attention = dict(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope="default",
        scale=(query_pre_attn_scalar or head_dim) ** -0.5,
        softcap=score_softcap,
        **dict.fromkeys(BIASES, attention_bias),
    )
    channel: dict[str, Any] = dict(
        channel="geglu", channel_args=dict(intermediate_size=intermediate_size, tanh=tanh), block="sandwich"
    )
    layers = (
        Layer(mixer="attention", mixer_args=attention if kind == FULL else attention | {"window": window}, **channel)
        for kind in kinds or every(2, depth)
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layers),
        embed=Embed(scale=hidden_size**0.5),
        head=Head(softcap=logit_softcap, tied=tied),
        norm=Norm(kind="rms_one_plus", eps=norm_eps),
        ropes={"default": rope or Rope(dim=head_dim)},
        max_position_embeddings=max_position_embeddings,
    )


_LAYER = "model.layers.{i}."
RULES: tuple[Rule, ...] = (
    rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
    rename("model.norm.weight", "model.norm.weight"),
    rename(_LAYER + "input_layernorm.weight", _LAYER + "mixer_norm.weight"),
    rename(_LAYER + "post_attention_layernorm.weight", _LAYER + "mixer_post_norm.weight"),
    rename(_LAYER + "pre_feedforward_layernorm.weight", _LAYER + "channel_norm.weight"),
    rename(_LAYER + "post_feedforward_layernorm.weight", _LAYER + "channel_post_norm.weight"),
    *linear_rules(_LAYER + "self_attn.", _LAYER + "mixer.", ("q_proj", "k_proj", "v_proj", "o_proj")),
    *linear_rules(_LAYER + "mlp.", _LAYER + "channel.", ("gate_proj", "up_proj", "down_proj")),
)
# what transformers takes for a field that a config leaves out
DEFAULTS: dict[str, Any] = dict(
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    attention_bias=False,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    final_logit_softcapping=30.0,
    attn_logit_softcapping=50.0,
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "gemma2"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; the head is tied unless the config says otherwise."""
    return *RULES, head_rule(bool(config.get("tie_word_embeddings", True)))


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Gemma 2 `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    config = {**DEFAULTS, **config}
    require(config, "hidden_activation", tuple(GELUS), "gelu_pytorch_tanh")
    require(config, "use_bidirectional_attention", (False,), False)
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate_size=config["intermediate_size"],
        window=config["sliding_window"],
        kinds=layer_types(config, period=2),
        query_pre_attn_scalar=config["query_pre_attn_scalar"],
        attention_bias=config["attention_bias"],
        score_softcap=config["attn_logit_softcapping"],
        logit_softcap=config["final_logit_softcapping"],
        tanh=GELUS[config["hidden_activation"]],
        rope=whole_rope(config, config["head_dim"]),
        norm_eps=config["rms_norm_eps"],
        tied=config["tie_word_embeddings"],
        max_position_embeddings=config["max_position_embeddings"],
    )


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Gemma 2 `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Gemma 2 cannot express.
    """
    fields = softmax_fields(decoder)
    attention, channel = decoder.layers[0].mixer_args, part_of(decoder, "channels", "geglu")
    if channel is None or "default" not in decoder.ropes:
        raise ZooError("Gemma 2 needs geglu channels and a rotary table named default; save as zoo")
    result = {
        **config,
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        **fields,
        "hidden_activation": "gelu_pytorch_tanh" if channel.tanh else "gelu",
        "rms_norm_eps": decoder.norm.eps,
        "query_pre_attn_scalar": squared(attention),
        "attn_logit_softcapping": attention.get("softcap"),
        "final_logit_softcapping": decoder.head.softcap,
        "rope_parameters": rope_parameters(decoder.ropes["default"]),
    }
    return confirm(result, decoder, _decoder)


def squared(attention: Mapping[str, Any]) -> int:
    """The `query_pre_attn_scalar` of attention's scale."""
    return round((attention.get("scale") or attention["head_dim"] ** -0.5) ** -2)
