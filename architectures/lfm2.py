"""LFM2 (Liquid AI 2025, arXiv 2511.23404): gated short convolutions, with grouped-query attention at a few depths.

Attention normalises queries and keys per head. The format is that of transformers' `lfm2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.local_global import whole_rope
from zoo.architectures.core.published import confirm, head_rule, linear_rules, part_of, require, rope_parameters
from zoo.architectures.core.rules import Rule, depthwise, rename
from zoo.architectures.mixers.attention import Args as AttentionArgs
from zoo.architectures.mixers.gated_short_conv import Args as ConvArgs
from zoo.errors import ZooError

ARCHITECTURE = "lfm2"
_ATTENTION = (2, 5, 8, 10, 12, 14)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, depth=3, attention_layers=(1,), heads=4, kv_heads=2, intermediate_size=128
    ),
    "350m": dict(
        vocab_size=65536,
        hidden_size=1024,
        depth=16,
        attention_layers=_ATTENTION,
        heads=16,
        kv_heads=8,
        intermediate_size=4608,
    ),
    "700m": dict(
        vocab_size=65536,
        hidden_size=1536,
        depth=16,
        attention_layers=_ATTENTION,
        heads=24,
        kv_heads=8,
        intermediate_size=6912,
    ),
    "1b2": dict(
        vocab_size=65536,
        hidden_size=2048,
        depth=16,
        attention_layers=_ATTENTION,
        heads=32,
        kv_heads=8,
        intermediate_size=8192,
    ),
}
# the model cards of LiquidAI/LFM2-350M, -700M and -1.2B
PARAMETERS = {"350m": 354_483_968, "700m": 742_489_344, "1b2": 1_170_340_608}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    attention_layers: Sequence[int],
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    head_dim: int | None = None,
    conv: int = 3,
    conv_bias: bool = False,
    rope: Rope | None = None,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 128000,
) -> DecoderConfig:
    """`depth` gated convolutions of width `conv`, but attention at the indices `attention_layers`."""
    head_dim = head_dim or hidden_size // heads
    attention = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope="default")
    attention |= dict(qk_norm="rms", qk_norm_eps=norm_eps)
    channel = dict(intermediate_size=intermediate_size)
    mixers = (
        ("attention", attention) if index in attention_layers else ("gated_short_conv", dict(conv=conv, bias=conv_bias))
        for index in range(depth)
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(
            Layer(mixer=name, mixer_args=args, channel="swiglu", channel_args=channel) for name, args in mixers
        ),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": rope or Rope(dim=head_dim, theta=1e6)},
        max_position_embeddings=max_position_embeddings,
    )


_LAYER = "model.layers.{i}."
RULES: tuple[Rule, ...] = (
    rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
    rename("model.embedding_norm.weight", "model.norm.weight"),
    rename(_LAYER + "operator_norm.weight", _LAYER + "mixer_norm.weight"),
    rename(_LAYER + "ffn_norm.weight", _LAYER + "channel_norm.weight"),
    *linear_rules(_LAYER + "self_attn.", _LAYER + "mixer.", ("q_proj", "k_proj", "v_proj")),
    rename(_LAYER + "self_attn.out_proj.weight", _LAYER + "mixer.o_proj.weight"),
    *(rename(f"{_LAYER}self_attn.{x}_layernorm.weight", f"{_LAYER}mixer.{x}_norm.weight") for x in "qk"),
    *linear_rules(_LAYER + "conv.", _LAYER + "mixer.", ("in_proj", "out_proj")),
    depthwise(_LAYER + "conv.conv.weight", [_LAYER + "mixer.convs.u"]),
    rename(_LAYER + "conv.conv.bias", _LAYER + "mixer.convs.u_bias"),
    *(
        rename(f"{_LAYER}feed_forward.{theirs}.weight", f"{_LAYER}channel.{ours}.weight")
        for theirs, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
    ),
)
# what transformers takes for a field that a config leaves out
DEFAULTS: dict[str, Any] = dict(
    vocab_size=65536,
    hidden_size=2560,
    intermediate_size=12288,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=128000,
    norm_eps=1e-5,
    conv_bias=False,
    conv_L_cache=3,
    block_multiple_of=256,
    block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=True,
    rope_theta=1e6,
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "lfm2"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; the head is tied unless the config says otherwise."""
    return *RULES, head_rule(_tied(config))


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for an LFM2 `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    config = {**DEFAULTS, **config}
    for name in ("use_pos_enc", "block_use_swiglu"):
        require(config, name, (True,), True)
    for name in ("conv_dim", "conv_dim_out", "block_dim"):
        require(config, name, (config["hidden_size"],), config["hidden_size"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=config["num_hidden_layers"],
        attention_layers=_attention_layers(config),
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        intermediate_size=_intermediate_size(config),
        conv=config["conv_L_cache"],
        conv_bias=config["conv_bias"],
        rope=whole_rope(config, head_dim),
        norm_eps=config["norm_eps"],
        tied=_tied(config),
        max_position_embeddings=config["max_position_embeddings"],
    )


def _tied(config: Mapping[str, Any]) -> bool:
    """`tie_embedding` is the older name."""
    return bool(config.get("tie_embedding", config.get("tie_word_embeddings", True)))


def _attention_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    depth, kinds = config["num_hidden_layers"], config.get("layer_types")
    if kinds is None:
        indices = config.get("full_attn_idxs")
        return tuple(range(depth) if indices is None else indices)
    if len(kinds) != depth or set(kinds) - {"conv", "full_attention"}:
        raise ZooError(f"layer_types was {list(kinds)}; it must name conv or full_attention for each of {depth} layers")
    return tuple(index for index, kind in enumerate(kinds) if kind == "full_attention")


def _intermediate_size(config: Mapping[str, Any]) -> int:
    """The channel's width: by default two thirds of the named one, times a factor, rounded up to a multiple."""
    size: int = config.get("block_ff_dim", config["intermediate_size"])
    if not config["block_auto_adjust_ff_dim"]:
        return size
    size, factor, multiple = int(2 * size / 3), config["block_ffn_dim_multiplier"], config["block_multiple_of"]
    return size if factor is None else multiple * -(-int(factor * size) // multiple)


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The LFM2 `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that LFM2 cannot express.
    """
    attention = part_of(decoder, "mixers", "attention") or AttentionArgs(heads=1, head_dim=decoder.hidden_size)
    conv = part_of(decoder, "mixers", "gated_short_conv") or ConvArgs()
    channel = part_of(decoder, "channels", "swiglu")
    if channel is None or "default" not in decoder.ropes:
        raise ZooError("LFM2 needs swiglu channels and a rotary table named default; save as zoo")
    result = {
        **config,
        "model_type": "lfm2",
        "architectures": ["Lfm2ForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "layer_types": ["full_attention" if layer.mixer == "attention" else "conv" for layer in decoder.layers],
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim,
        "intermediate_size": channel.intermediate_size,
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": conv.conv,
        "conv_bias": conv.bias,
        "norm_eps": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
        "rope_parameters": rope_parameters(decoder.ropes["default"]),
    }
    return confirm(result, decoder, _decoder)
