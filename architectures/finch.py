"""Finch, RWKV-6 (Peng et al. 2024, arXiv 2404.05892), and its checkpoints in the tensor layout of rwkv.cpp
(`rwkv_version` 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.architectures.core import rwkv_cpp
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.rules import Rule, TensorSpec, rename

ARCHITECTURE = "finch"
WORLD = dict(vocab_size=65536, head_dim=64, max_position_embeddings=4096)
LARGE = dict(hidden_size=4096, mix_rank=64, decay_rank=128)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=3, heads=4, head_dim=16, mix_rank=8, decay_rank=16),
    "1b6": dict(hidden_size=2048, depth=24, **WORLD),
    "3b": dict(hidden_size=2560, depth=32, **WORLD),
    "7b": dict(depth=32, **LARGE, **WORLD),
    "14b": dict(depth=61, **LARGE, **WORLD),
}
# 1b6 and 3b: arXiv 2404.05892, to the digits printed there; of 7b and 14b no count is published
PARAMETERS = {"1b6": 1_600_000_000, "3b": 3_100_000_000}
SIZES = {
    "num_heads": ("blocks.0.att.time_faaaa", 0),
    "head_dim": ("blocks.0.att.time_faaaa", 1),
    "intermediate_size": ("blocks.0.ffn.key.weight", 0),
    "mix_rank": ("blocks.0.att.time_maa_w2", 2),
    "decay_rank": ("blocks.0.att.time_decay_w1", 0),
}

RULES: tuple[Rule, ...] = (
    *rwkv_cpp.shared_rules(),
    *rwkv_cpp.projection_rules("receptance", "key", "value", "gate", "output"),
    *(rename(f"{rwkv_cpp.ATTENTION}ln_x.{w}", f"{rwkv_cpp.MIXER}norm_{w}") for w in ("weight", "bias")),
    *(rename(f"{rwkv_cpp.ATTENTION}time_maa_{n}", f"{rwkv_cpp.MIXER}mix_{n}") for n in "xwkvrg"),
    *(rename(f"{rwkv_cpp.FFN}time_maa_{n}", f"{rwkv_cpp.CHANNEL}mix_{n}") for n in "kr"),
    rename(rwkv_cpp.ATTENTION + "time_maa_w1", rwkv_cpp.MIXER + "mix_down.weight"),
    rename(rwkv_cpp.ATTENTION + "time_maa_w2", rwkv_cpp.MIXER + "mix_up"),
    rename(rwkv_cpp.ATTENTION + "time_decay_w1", rwkv_cpp.MIXER + "decay_map.down.weight"),
    rename(rwkv_cpp.ATTENTION + "time_decay_w2", rwkv_cpp.MIXER + "decay_map.up.weight"),
)


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    head_dim: int,
    heads: int | None = None,
    intermediate_size: int | None = None,
    mix_rank: int = 32,
    decay_rank: int = 64,
    norm_eps: float = 64e-5,
    max_position_embeddings: int = 4096,
) -> DecoderConfig:
    """`depth` layers; the channel is 3.5 times as wide (in steps of 32) unless `intermediate_size` is given."""
    sizes = {"heads": heads or hidden_size // head_dim, "head_dim": head_dim, "norm_eps": norm_eps}
    return rwkv_cpp.layers(
        [{**sizes, "mix_rank": mix_rank, "decay_rank": decay_rank}] * depth,
        mixer="rwkv6",
        channel={"intermediate_size": intermediate_size or rwkv_cpp.usual_width(hidden_size), "weighs": "before"},
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return rwkv_cpp.matches(config, 6)


def complete(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """`config` with the sizes that it leaves to the tensors."""
    return rwkv_cpp.complete(config, tensors, SIZES)


def rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The key rules."""
    return (
        *RULES,
        rwkv_cpp.per_channel("time_faaaa", "bonus", config),
        rwkv_cpp.per_channel("time_decay", "decay_map.offset", config, flat=True),
    )


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a completed `config.json`."""
    sizes = {name: config[name] for name in ("head_dim", "mix_rank", "decay_rank")}
    norm_eps = config.get("norm_eps", 64e-5)
    return layout(**rwkv_cpp.sizes_of(config), heads=config["num_heads"], norm_eps=norm_eps, **sizes)


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of `decoder`; `config` holds the fields to carry over.

    Raises:
        ZooError: a decoder that the format cannot express.
    """
    names = {"num_heads": "heads"} | {name: name for name in ("head_dim", "mix_rank", "decay_rank", "norm_eps")}
    return rwkv_cpp.published(decoder, config, 6, "rwkv6", names, _decoder)


_decoder = decoder  # `published` has an argument of that name
