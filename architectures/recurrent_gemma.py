"""RecurrentGemma (Botev et al. 2024, arXiv 2404.07839): two RG-LRU layers, then local attention, as in Griffin.

Embeddings are multiplied by the root of the width and logits soft-capped. The format is that of transformers'
`recurrent_gemma`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm, Rope
from zoo.architectures.core.local_global import GELUS
from zoo.architectures.core.published import confirm, head_rule, linear_rules, part_of, require, rope, rope_parameters
from zoo.architectures.core.rules import Rule, depthwise, rename
from zoo.architectures.mixers.attention import Args as AttentionArgs
from zoo.architectures.mixers.rg_lru import Args as RGLRUArgs
from zoo.errors import ZooError

ARCHITECTURE = "recurrent_gemma"
PATTERN = ("recurrent", "recurrent", "attention")
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=3, heads=4, intermediate_size=128, window=8),
    "2b": dict(vocab_size=256000, hidden_size=2560, depth=26, heads=10, intermediate_size=7680),
    "9b": dict(vocab_size=256000, hidden_size=4096, depth=38, heads=16, intermediate_size=12288),
}
# transformers' own class with the published configs (google/recurrentgemma-2b and -9b)
PARAMETERS = {"2b": 2_682_862_080, "9b": 8_579_977_216}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    kv_heads: int = 1,
    window: int = 2048,
    width: int | None = None,
    conv: int = 4,
    kinds: Sequence[str] = PATTERN,
    attention_bias: bool = False,
    tanh: bool = True,
    scaled: bool = True,
    logit_softcap: float | None = 30.0,
    rope: Rope | None = None,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 8192,
) -> DecoderConfig:
    """`depth` layers of the `kinds` (recurrent, attention) in turn; RG-LRUs have `width` channels (None: hidden size).

    `scaled` multiplies embeddings by the root of the hidden size, rounded to bf16 as published.
    """
    head_dim = hidden_size // heads
    attention = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=window, rope="default", o_bias=True)
    attention |= dict.fromkeys(("q_bias", "k_bias", "v_bias"), attention_bias)
    recurrent = dict(heads=heads, width=width or hidden_size, conv=conv, tanh=tanh)
    channel: dict[str, Any] = dict(
        channel="geglu", channel_args=dict(intermediate_size=intermediate_size, tanh=tanh, bias=True)
    )
    layers = {
        "recurrent": Layer(mixer="rg_lru", mixer_args=recurrent, **channel),
        "attention": Layer(mixer="attention", mixer_args=attention, **channel),
    }
    if unknown := sorted(set(kinds) - set(layers)) or not kinds:
        raise ZooError(f"block_types was {unknown or list(kinds)}; it must name recurrent or attention")
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layers[kinds[index % len(kinds)]] for index in range(depth)),
        embed=Embed(scale=float(torch.tensor(hidden_size**0.5, dtype=torch.bfloat16, device="cpu")) if scaled else 1.0),
        head=Head(softcap=logit_softcap, tied=tied),
        norm=Norm(kind="rms_one_plus", eps=norm_eps),
        ropes={"default": rope or Rope(dim=head_dim // 2)} if "attention" in kinds else {},
        max_position_embeddings=max_position_embeddings,
    )


_LAYER = "model.layers.{i}."
_UNIT, _OURS = _LAYER + "temporal_block.rg_lru.", _LAYER + "mixer."
RULES: tuple[Rule, ...] = (
    rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
    rename("model.final_norm.weight", "model.norm.weight"),
    rename(_LAYER + "temporal_pre_norm.weight", _LAYER + "mixer_norm.weight"),
    rename(_LAYER + "channel_pre_norm.weight", _LAYER + "channel_norm.weight"),
    *linear_rules(_LAYER + "temporal_block.", _OURS, ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(
        rename(f"{_LAYER}temporal_block.linear_{name}.{kind}", f"{_OURS}{name}_proj.{kind}")
        for name in ("x", "y", "out")
        for kind in ("weight", "bias")
    ),
    depthwise(_LAYER + "temporal_block.conv_1d.weight", [_OURS + "convs.x"]),
    rename(_LAYER + "temporal_block.conv_1d.bias", _OURS + "convs.x_bias"),
    rename(_UNIT + "recurrent_param", _OURS + "a_param"),
    *(
        rename(f"{_UNIT}{gate}_{kind}", f"{_OURS}{gate}.{kind}")
        for gate in ("input_gate", "recurrent_gate")
        for kind in ("weight", "bias")
    ),
    *linear_rules(_LAYER + "mlp_block.", _LAYER + "channel.", ("gate_proj", "up_proj", "down_proj")),
)
# what transformers takes for a field that a config leaves out
DEFAULTS: dict[str, Any] = dict(
    num_hidden_layers=26,
    vocab_size=256000,
    hidden_size=2560,
    intermediate_size=7680,
    num_attention_heads=10,
    attention_window_size=2048,
    conv1d_width=4,
    logits_soft_cap=30.0,
    rms_norm_eps=1e-6,
    hidden_activation="gelu_pytorch_tanh",
    attention_bias=False,
    tie_word_embeddings=True,
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "recurrent_gemma"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; the head is tied unless the config says otherwise."""
    return *RULES, head_rule(bool(config.get("tie_word_embeddings", True)))


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a RecurrentGemma `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    config = {**DEFAULTS, **config}
    require(config, "hidden_activation", tuple(GELUS), "gelu_pytorch_tanh")
    require(config, "embeddings_scale_by_sqrt_dim", (True,), True)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    require(config, "head_dim", (width // heads,), width // heads)
    table = rope(config, width // heads, partial=0.5)
    require({**config, "rope_type": table.scaling.get("rope_type")}, "rope_type", ("default",), "default")
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        depth=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        intermediate_size=config["intermediate_size"] // 2,
        window=config["attention_window_size"],
        width=config.get("lru_width") or width,
        conv=config["conv1d_width"],
        kinds=tuple(config.get("block_types") or config.get("_block_types") or PATTERN),
        attention_bias=config["attention_bias"],
        tanh=GELUS[config["hidden_activation"]],
        logit_softcap=config["logits_soft_cap"],
        rope=table,
        norm_eps=config["rms_norm_eps"],
        tied=config["tie_word_embeddings"],
        max_position_embeddings=config.get("max_position_embeddings", 8192),
    )


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The RecurrentGemma `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that RecurrentGemma cannot express.
    """
    attention, unit = part_of(decoder, "mixers", "attention"), part_of(decoder, "mixers", "rg_lru")
    channel = part_of(decoder, "channels", "geglu")
    heads = (attention or unit or RGLRUArgs(heads=1, width=1)).heads
    attention = attention or AttentionArgs(heads=heads, head_dim=decoder.hidden_size // heads, window=2048)
    unit = unit or RGLRUArgs(heads=heads, width=decoder.hidden_size)
    if channel is None or attention.window is None or "default" not in decoder.ropes:
        raise ZooError("RecurrentGemma needs geglu channels and windowed attention with RoPE; save as zoo")
    result = {
        **config,
        "model_type": "recurrent_gemma",
        "architectures": ["RecurrentGemmaForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "block_types": ["attention" if layer.mixer == "attention" else "recurrent" for layer in decoder.layers],
        "num_attention_heads": heads,
        "num_key_value_heads": attention.kv_heads or heads,
        "attention_window_size": attention.window,
        "attention_bias": attention.q_bias,
        "lru_width": unit.width,
        "conv1d_width": unit.conv,
        "intermediate_size": 2 * channel.intermediate_size,
        "hidden_activation": "gelu_pytorch_tanh" if channel.tanh else "gelu",
        "logits_soft_cap": decoder.head.softcap,
        "rms_norm_eps": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
        "rope_parameters": rope_parameters(decoder.ropes["default"], decoder.hidden_size // heads),
    }
    return confirm(result, decoder, _decoder)
