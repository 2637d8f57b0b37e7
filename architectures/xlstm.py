"""xLSTM (Beck et al. 2024, arXiv 2405.04517) in the form of xLSTM 7B (Beck et al. 2025, arXiv 2503.13427), and its
checkpoints as transformers publishes them (`xlstm`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm
from zoo.architectures.core.published import confirm, part_of, require
from zoo.architectures.core.rules import Rule, rename, split
from zoo.errors import ZooError

ARCHITECTURE = "xlstm"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=3, heads=2),
    "slstm_tiny": dict(vocab_size=256, hidden_size=64, depth=3, heads=2, slstm_at=(1,)),
    "7b": dict(vocab_size=50304, hidden_size=4096, depth=32, heads=8),
}
# from the published config of NX-AI/xLSTM-7b; arXiv 2503.13427 says 6.87B
PARAMETERS = {"7b": 6_865_424_896}

# fields that must have these values: what else they stand for is not computed here
FIXED: dict[str, tuple[Any, ...]] = {
    "use_bias": (False,),
    "add_out_norm": (True,),
    "add_qk_norm": (False,),
    "add_post_norm": (False,),
    "tie_word_embeddings": (False,),
    "norm_reduction_force_float32": (True,),
    "inference_state_dtype": ("float32",),
    "eps": (1e-6,),
    "weight_mode": ("single", "fused"),
}
UP_FACTOR, STEP = 2.667, 64  # the published width of the channel, and what it is rounded up to

_BLOCK, _LAYER = "backbone.blocks.{i}.", "model.layers.{i}."
_CELL, _MIXER = _BLOCK + "mlstm_layer.", _LAYER + "mixer."
_FFN, _CHANNEL = _BLOCK + "ffn.", _LAYER + "channel."
RULES: tuple[Rule, ...] = (
    rename("backbone.embeddings.weight", "model.embed_tokens.weight"),
    rename("backbone.out_norm.weight", "model.norm.weight"),
    rename("lm_head.weight", "lm_head.weight"),
    rename(_BLOCK + "norm_mlstm.weight", _LAYER + "mixer_norm.weight"),
    rename(_BLOCK + "norm_ffn.weight", _LAYER + "channel_norm.weight"),
    rename(_CELL + "multihead_norm.weight", _MIXER + "norm_weight"),
    rename(_CELL + "out_proj.weight", _MIXER + "o_proj.weight"),
    rename(_FFN + "proj_down.weight", _CHANNEL + "down_proj.weight"),
)
_SINGLE: tuple[Rule, ...] = (
    *(rename(f"{_CELL}{name}.weight", f"{_MIXER}{name}_proj.weight") for name in "qkv"),
    rename(_CELL + "ogate_preact.weight", _MIXER + "g_proj.weight"),
    *(rename(f"{_CELL}{name[0]}gate_preact.weight", f"{_MIXER}{name}_gate.weight") for name in ("input", "forget")),
    *(rename(f"{_CELL}{name[0]}gate_preact.bias", f"{_MIXER}{name}_bias") for name in ("input", "forget")),
    rename(_FFN + "proj_up_gate.weight", _CHANNEL + "gate_proj.weight"),
    rename(_FFN + "proj_up.weight", _CHANNEL + "up_proj.weight"),
)


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    key_size: int | None = None,
    value_size: int | None = None,
    intermediate_size: int | None = None,
    gate_softcap: float | None = 15.0,
    logit_softcap: float | None = 30.0,
    slstm_at: Sequence[int] = (),
    norm_eps: float = 1e-6,
    max_position_embeddings: int = 8192,
) -> DecoderConfig:
    """`depth` layers of mLSTM, with sLSTM at the places `slstm_at` (from 0).

    Keys of all heads together are `key_size` wide (half the hidden size), values `value_size` (the hidden size), the
    channel `intermediate_size` (8/3 of it, rounded up to a multiple of 64).

    Raises:
        ZooError: heads that do not divide the keys or the values.
    """
    keys, values = key_size or hidden_size // 2, value_size or hidden_size
    for name, size in (("key_size", keys), ("value_size", values)):
        if heads < 1 or size % heads:
            raise ZooError(f"heads was {heads}; it must divide {name} ({size})")
    matrix: dict[str, Any] = {"heads": heads, "head_dim": keys // heads, "value_dim": values // heads}
    matrix |= {"gate_softcap": gate_softcap, "norm_eps": norm_eps}
    channel = {"intermediate_size": intermediate_size or round_up(hidden_size * UP_FACTOR, STEP)}

    def layer(index: int) -> Layer:
        if index in slstm_at:
            scalar = {"heads": heads, "layer_index": index, "depth": depth}
            return Layer(mixer="slstm", mixer_args=scalar, channel="swiglu", channel_args=channel)
        return Layer(mixer="mlstm", mixer_args=matrix, channel="swiglu", channel_args=channel)

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(index) for index in range(depth)),
        head=Head(softcap=logit_softcap),
        norm=Norm(eps=norm_eps),
        max_position_embeddings=max_position_embeddings,
    )


def round_up(size: float, multiple: int) -> int:
    """The next multiple, as the published code rounds."""
    return int((size + multiple - 1) // multiple * multiple)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "xlstm"


def rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The key rules; with `weight_mode` fused, the projections of one input are one tensor."""
    if config.get("weight_mode", "single") == "single":
        return (*RULES, *_SINGLE)
    keys, values = _widths(config)
    projections = [f"{_MIXER}{name}_proj.weight" for name in "qkvg"]
    return (
        *RULES,
        split(_CELL + "qkv_opreact.weight", projections, [keys, keys, values, values]),
        split(_CELL + "ifgate_preact.weight", [f"{_MIXER}{name}_gate.weight" for name in ("input", "forget")]),
        split(_CELL + "ifgate_preact.bias", [f"{_MIXER}{name}_bias" for name in ("input", "forget")]),
        split(_FFN + "proj_up_gate_z.weight", [f"{_CHANNEL}{name}_proj.weight" for name in ("gate", "up")]),
    )


def _widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Keys and values of all heads together."""
    width = config["hidden_size"]
    return int(width * config.get("qk_dim_factor", 0.5)), int(width * config.get("v_dim_factor", 1.0))


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a published `config.json`. Which kernels it names, and in what chunks, changes nothing.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    for name, allowed in FIXED.items():
        require(config, name, allowed, allowed[0])
    width, depth = config["hidden_size"], config.get("num_hidden_layers") or config["num_blocks"]
    require(config, "embedding_dim", (width,), width)
    require(config, "num_blocks", (depth,), depth)
    keys, values = _widths(config)
    multiple = config.get("ffn_round_up_to_multiple_of", STEP)
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        depth=depth,
        heads=config["num_heads"],
        key_size=keys,
        value_size=values,
        intermediate_size=round_up(width * config.get("ffn_proj_factor", UP_FACTOR), multiple),
        gate_softcap=config.get("gate_soft_cap", 15.0),
        logit_softcap=config.get("output_logit_soft_cap", 30.0),
        norm_eps=config.get("norm_eps", 1e-6),
        max_position_embeddings=config.get("max_position_embeddings", 8192),
    )


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of `decoder`; `config` holds the fields to carry over.

    Raises:
        ZooError: a decoder that the format cannot express.
    """
    mixer, channel = part_of(decoder, "mixers", "mlstm"), part_of(decoder, "channels", "swiglu")
    if mixer is None or channel is None:
        raise ZooError("xlstm needs layers of mlstm and swiglu; save this model as zoo")
    width = decoder.hidden_size
    usual = channel.intermediate_size == round_up(width * UP_FACTOR, STEP)
    result = {
        **config,
        "model_type": "xlstm",
        "architectures": ["xLSTMForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": width,
        "embedding_dim": width,
        "num_hidden_layers": len(decoder.layers),
        "num_blocks": len(decoder.layers),
        "num_heads": mixer.heads,
        "qk_dim_factor": _factor(mixer.heads * mixer.head_dim, width),
        "v_dim_factor": _factor(mixer.heads * (mixer.value_dim or mixer.head_dim), width),
        "ffn_proj_factor": UP_FACTOR if usual else _factor(channel.intermediate_size, width),
        "ffn_round_up_to_multiple_of": STEP if usual else 1,
        "gate_soft_cap": mixer.gate_softcap,
        "output_logit_soft_cap": decoder.head.softcap,
        "norm_eps": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": False,
    }
    return confirm(result, decoder, _decoder)


def _factor(size: int, width: int) -> float:
    """A factor that `int(width * factor)` makes `size` of; where the plain quotient rounds down, half a step more."""
    return size / width if int(width * (size / width)) == size else (size + 0.5) / width


_decoder = decoder  # `published` has an argument of that name
