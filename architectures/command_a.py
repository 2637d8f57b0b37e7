"""Command A (Cohere 2025, arXiv 2504.00698): three layers with a window and RoPE, then one that sees everything and has
no positions.

Attention and SwiGLU stand side by side behind one LayerNorm without bias; logits are scaled. The format is that of
transformers' `cohere2`, which Command R7B has too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.local_global import BIASES, FULL, every, layer_types, softmax_fields, whole_rope
from zoo.architectures.core.published import confirm, head_rule, linear_rules, require, rope_parameters
from zoo.architectures.core.rules import Rule, rename
from zoo.errors import ZooError

ARCHITECTURE = "command_a"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=4, heads=4, kv_heads=2, intermediate_size=128, window=8),
    "r7b": dict(vocab_size=256000, hidden_size=4096, depth=32, heads=32, kv_heads=8, intermediate_size=14336),
    "111b": dict(
        vocab_size=256000,
        hidden_size=12288,
        depth=64,
        heads=96,
        kv_heads=8,
        intermediate_size=36864,
        max_position_embeddings=262144,
    ),
}
# transformers' own class with the published configs (c4ai-command-r7b-12-2024, c4ai-command-a-03-2025)
PARAMETERS = {"r7b": 8_028_033_024, "111b": 111_057_580_032}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    window: int | None = 4096,
    kinds: Sequence[str] | None = None,
    attention_bias: bool = False,
    logit_scale: float = 0.25,
    rope: Rope | None = None,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 131072,
) -> DecoderConfig:
    """`depth` layers, each fourth full and without RoPE, or as `kinds` (sliding_attention, full_attention) says."""
    head_dim = hidden_size // heads
    attention = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, **dict.fromkeys(BIASES, attention_bias))
    local = attention | {"rope": "default", "window": window}
    channel: dict[str, Any] = dict(
        channel="swiglu", channel_args=dict(intermediate_size=intermediate_size), block="parallel"
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(
            Layer(mixer="attention", mixer_args=attention if kind == FULL else local, **channel)
            for kind in kinds or every(4, depth)
        ),
        head=Head(scale=logit_scale, tied=tied),
        norm=Norm(kind="layer", eps=norm_eps, bias=False),
        ropes={"default": rope or Rope(dim=head_dim, theta=50000.0, pairing="interleaved")},
        max_position_embeddings=max_position_embeddings,
    )


_LAYER = "model.layers.{i}."
RULES: tuple[Rule, ...] = (
    rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
    rename("model.norm.weight", "model.norm.weight"),
    rename(_LAYER + "input_layernorm.weight", _LAYER + "norm.weight"),
    *linear_rules(_LAYER + "self_attn.", _LAYER + "mixer.", ("q_proj", "k_proj", "v_proj", "o_proj")),
    *linear_rules(_LAYER + "mlp.", _LAYER + "channel.", ("gate_proj", "up_proj", "down_proj")),
)
# what transformers takes for a field that a config leaves out
DEFAULTS: dict[str, Any] = dict(
    vocab_size=256000,
    hidden_size=8192,
    intermediate_size=22528,
    logit_scale=0.0625,
    num_hidden_layers=40,
    num_attention_heads=64,
    max_position_embeddings=8192,
    layer_norm_eps=1e-5,
    tie_word_embeddings=True,
    attention_bias=False,
    sliding_window=4096,
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "cohere2"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; the head is tied unless the config says otherwise."""
    return *RULES, head_rule(bool(config.get("tie_word_embeddings", True)))


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Cohere 2 `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    config = {**DEFAULTS, **config}
    require(config, "hidden_act", ("silu", "swish"), "silu")
    require(config, "use_qk_norm", (False,), False)
    for name in ("use_parallel_block", "use_gated_activation"):
        require(config, name, (True,), True)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    require(config, "head_dim", (width // heads,), width // heads)
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        depth=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        intermediate_size=config["intermediate_size"],
        window=config["sliding_window"],
        kinds=layer_types(config, period=4),
        attention_bias=config["attention_bias"],
        logit_scale=config["logit_scale"],
        rope=whole_rope(config, width // heads, pairing="interleaved"),
        norm_eps=config["layer_norm_eps"],
        tied=config["tie_word_embeddings"],
        max_position_embeddings=config["max_position_embeddings"],
    )


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Cohere 2 `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Cohere 2 cannot express.
    """
    fields = softmax_fields(decoder)
    if "default" not in decoder.ropes:
        raise ZooError("Cohere 2 needs a rotary table named default; save as zoo")
    result = {
        **config,
        "model_type": "cohere2",
        "architectures": ["Cohere2ForCausalLM"],
        **fields,
        "hidden_act": "silu",
        "layer_norm_eps": decoder.norm.eps,
        "logit_scale": decoder.head.scale,
        "rope_parameters": rope_parameters(decoder.ropes["default"]),
    }
    return confirm(result, decoder, _decoder)
