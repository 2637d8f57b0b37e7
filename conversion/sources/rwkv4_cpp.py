"""RWKV-4 checkpoints in the tensor layout of rwkv.cpp (`rwkv_version` 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.architectures import rwkv4
from zoo.architectures.core import rwkv_cpp
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.operations import Operation
from zoo.architectures.core.rules import Rule, TensorSpec, rename, through

ARCHITECTURE = "rwkv4"
SIZES = {"attention_size": ("blocks.0.att.key.weight", 0), "intermediate_size": ("blocks.0.ffn.key.weight", 0)}

RULES: tuple[Rule, ...] = (
    *rwkv_cpp.shared_rules(),
    *rwkv_cpp.projection_rules("receptance", "key", "value", "output"),
    *(rename(f"{rwkv_cpp.ATTENTION}time_mix_{n}", f"{rwkv_cpp.MIXER}mix_{n}") for n in "kvr"),
    *(rename(f"{rwkv_cpp.FFN}time_mix_{n}", f"{rwkv_cpp.CHANNEL}mix_{n}") for n in "kr"),
    rename(rwkv_cpp.ATTENTION + "time_first", rwkv_cpp.MIXER + "time_first"),
    through(  # the file holds -exp(w)
        rwkv_cpp.ATTENTION + "time_decay",
        rwkv_cpp.MIXER + "time_decay",
        (Operation("negate"), Operation("log")),
        (Operation("exp"), Operation("negate")),
    ),
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return rwkv_cpp.matches(config, 4)


def complete(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """`config` with the sizes that it leaves to the tensors."""
    return rwkv_cpp.complete(config, tensors, SIZES)


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a completed `config.json`."""
    return rwkv4.layout(**rwkv_cpp.sizes_of(config), attention_size=config["attention_size"])


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of `decoder`; `config` holds the fields to carry over.

    Raises:
        ZooError: a decoder that the format cannot express.
    """
    return rwkv_cpp.published(decoder, config, 4, "rwkv4", {"attention_size": "attention_size"}, _decoder)


_decoder = decoder  # `published` has an argument of that name
