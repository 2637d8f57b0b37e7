"""Goose, RWKV-7 (Peng et al. 2025, arXiv 2503.14456), and its checkpoints in the tensor layout of rwkv.cpp
(`rwkv_version` 7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.architectures.core import rwkv_cpp
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.rules import Rule, TensorSpec, rename, reshape

ARCHITECTURE = "goose"
RANKS = ("decay_rank", "rate_rank", "value_rank", "gate_rank")
WORLD = dict(vocab_size=65536, head_dim=64, max_position_embeddings=4096)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=3,
        heads=4,
        head_dim=16,
        decay_rank=16,
        rate_rank=16,
        value_rank=8,
        gate_rank=16,
    ),
    "0b19": dict(hidden_size=768, depth=12, **WORLD),
    "0b4": dict(hidden_size=1024, depth=24, **WORLD),
    "1b5": dict(hidden_size=2048, depth=24, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=256, **WORLD),
    "2b9": dict(hidden_size=2560, depth=32, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=320, **WORLD),
}
# the parameter counts of arXiv 2503.14456
PARAMETERS = {"0b19": 191_034_624, "0b4": 450_767_872, "1b5": 1_527_404_544, "2b9": 2_947_735_040}
SIZES = {
    "num_heads": ("blocks.0.att.r_k", 0),
    "head_dim": ("blocks.0.att.r_k", 1),
    "intermediate_size": ("blocks.0.ffn.key.weight", 0),
    "decay_rank": ("blocks.0.att.w1", 0),
    "rate_rank": ("blocks.0.att.a1", 0),
    "value_rank": ("blocks.1.att.v1", 0),
    "gate_rank": ("blocks.0.att.g1", 0),
}
_MAPS = {"w": "decay_map", "a": "rate_map", "v": "value_map", "g": "gate_map"}
_VECTORS = {"k_k": "erase_scale", "k_a": "rate_scale"} | {f"{n}0": f"{_MAPS[n]}.offset" for n in "wav"}

RULES: tuple[Rule, ...] = (
    *rwkv_cpp.shared_rules(gated_channel=False),
    *rwkv_cpp.projection_rules("receptance", "key", "value", "output"),
    *(rename(f"{rwkv_cpp.ATTENTION}ln_x.{w}", f"{rwkv_cpp.MIXER}norm_{w}") for w in ("weight", "bias")),
    rename(rwkv_cpp.ATTENTION + "r_k", rwkv_cpp.MIXER + "bonus"),
    *(rename(f"{rwkv_cpp.ATTENTION}{n}1", f"{rwkv_cpp.MIXER}{map_}.down.weight") for n, map_ in _MAPS.items()),
    *(rename(f"{rwkv_cpp.ATTENTION}{n}2", f"{rwkv_cpp.MIXER}{map_}.up.weight") for n, map_ in _MAPS.items()),
    *(
        reshape(rwkv_cpp.ATTENTION + name, rwkv_cpp.MIXER + ours, to=(-1,), back=(1, 1, -1))
        for name, ours in _VECTORS.items()
    ),
    reshape(rwkv_cpp.FFN + "x_k", rwkv_cpp.CHANNEL + "mix_k", to=(-1,), back=(1, 1, -1)),
    reshape(rwkv_cpp.ATTENTION + "x_rwkvag", rwkv_cpp.MIXER + "mix", to=(6, -1), back=(6, 1, -1)),
)


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    head_dim: int,
    heads: int | None = None,
    intermediate_size: int | None = None,
    decay_rank: int = 64,
    rate_rank: int = 64,
    value_rank: int = 32,
    gate_rank: int = 128,
    norm_eps: float = 64e-5,
    max_position_embeddings: int = 4096,
) -> DecoderConfig:
    """`depth` layers, the first of which hands its value to the others; the channel is four times as wide unless
    `intermediate_size` is given."""
    mixer = {
        "heads": heads or hidden_size // head_dim,
        "head_dim": head_dim,
        "decay_rank": decay_rank,
        "rate_rank": rate_rank,
        "value_rank": value_rank,
        "gate_rank": gate_rank,
        "norm_eps": norm_eps,
    }
    channel = {"intermediate_size": intermediate_size or 4 * hidden_size}
    return rwkv_cpp.layers(
        [{**mixer, "first_value": "read" if index else "write"} for index in range(depth)],
        mixer="rwkv7",
        channel={**channel, "weighs": "before", "gate": False, "mix_power": 4.0},
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return rwkv_cpp.matches(config, 7)


def complete(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """`config` with the sizes that it leaves to the tensors."""
    return rwkv_cpp.complete(config, tensors, SIZES)


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a completed `config.json`."""
    options = {name: config[name] for name in (*RANKS, "norm_eps") if name in config}  # one layer has no value rank
    return layout(**rwkv_cpp.sizes_of(config), heads=config["num_heads"], head_dim=config["head_dim"], **options)


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of `decoder`; `config` holds the fields to carry over.

    Raises:
        ZooError: a decoder that the format cannot express.
    """
    names = {"num_heads": "heads"} | {name: name for name in ("head_dim", *RANKS, "norm_eps")}
    return rwkv_cpp.published(decoder, config, 7, "rwkv7", names, _decoder)


_decoder = decoder  # `published` has an argument of that name
