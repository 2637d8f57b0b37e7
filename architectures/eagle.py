"""Eagle, RWKV-5 (Peng et al. 2024, arXiv 2404.05892), and its checkpoints in the tensor layout of rwkv.cpp
(`rwkv_version` 5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.architectures.core import rwkv_cpp
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.published import require
from zoo.architectures.core.rules import Rule, TensorSpec, rename

ARCHITECTURE = "eagle"
WORLD = dict(vocab_size=65536, head_dim=64, max_position_embeddings=4096)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=3, heads=4, head_dim=16),
    "0b4": dict(hidden_size=1024, depth=24, **WORLD),
    "1b5": dict(hidden_size=2048, depth=24, **WORLD),
    "3b": dict(hidden_size=2560, depth=32, **WORLD),
    "7b": dict(hidden_size=4096, depth=32, **WORLD),
}
# arXiv 2404.05892, to the digits printed there
PARAMETERS = {"0b4": 462_000_000, "1b5": 1_580_000_000, "3b": 3_060_000_000, "7b": 7_520_000_000}
NORM_EPS = 1e-5  # that of rwkv.cpp where a config is silent; the published training code has 1e-5 * 8^2
SIZES = {
    "num_heads": ("blocks.0.att.time_faaaa", 0),
    "head_dim": ("blocks.0.att.time_faaaa", 1),
    "intermediate_size": ("blocks.0.ffn.key.weight", 0),
}

RULES: tuple[Rule, ...] = (
    *rwkv_cpp.shared_rules(),
    *rwkv_cpp.projection_rules("receptance", "key", "value", "gate", "output"),
    *(rename(f"{rwkv_cpp.ATTENTION}ln_x.{w}", f"{rwkv_cpp.MIXER}norm_{w}") for w in ("weight", "bias")),
    *(rename(f"{rwkv_cpp.ATTENTION}time_mix_{n}", f"{rwkv_cpp.MIXER}mix_{n}") for n in "rkvg"),
    *(rename(f"{rwkv_cpp.FFN}time_mix_{n}", f"{rwkv_cpp.CHANNEL}mix_{n}") for n in "kr"),
)


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    head_dim: int,
    heads: int | None = None,
    intermediate_size: int | None = None,
    norm_eps: float = 64e-5,
    max_position_embeddings: int = 4096,
) -> DecoderConfig:
    """`depth` layers; the channel is 3.5 times as wide (in steps of 32) unless `intermediate_size` is given."""
    return rwkv_cpp.layers(
        [{"heads": heads or hidden_size // head_dim, "head_dim": head_dim, "norm_eps": norm_eps}] * depth,
        mixer="rwkv5",
        channel={"intermediate_size": intermediate_size or rwkv_cpp.usual_width(hidden_size)},
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return rwkv_cpp.matches(config, 5)


def complete(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """`config` with the sizes that it leaves to the tensors."""
    return rwkv_cpp.complete(config, tensors, SIZES)


def rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The key rules."""
    to, back = ("log", "negate", "log"), ("exp", "negate", "exp")  # the file holds exp(-exp(w))
    return (
        *RULES,
        rwkv_cpp.per_channel("time_faaaa", "bonus", config),
        rwkv_cpp.per_channel("time_decay", "time_decay", config, to, back),
    )


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a completed `config.json`.

    Raises:
        ZooError: a version before 5.2, whose decays are per head and which has no gate.
    """
    require(config, "rwkv_version", (5.2,), None)
    return layout(
        **rwkv_cpp.sizes_of(config),
        heads=config["num_heads"],
        head_dim=config["head_dim"],
        norm_eps=config.get("norm_eps", NORM_EPS),
    )


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of `decoder`; `config` holds the fields to carry over.

    Raises:
        ZooError: a decoder that the format cannot express.
    """
    names = {"num_heads": "heads", "head_dim": "head_dim", "norm_eps": "norm_eps"}
    return rwkv_cpp.published(decoder, config, 5.2, "rwkv5", names, _decoder)


_decoder = decoder  # `published` has an argument of that name
