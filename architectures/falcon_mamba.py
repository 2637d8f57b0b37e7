"""Falcon-Mamba (Zuo et al. 2024, arXiv 2410.05355): Mamba with time steps, B and C normalised without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.architectures import mamba
from zoo.architectures.core import published as published_format
from zoo.architectures.core.config import DecoderConfig

ARCHITECTURE = "falcon_mamba"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, state_dim=8),
    "7b": dict(vocab_size=65024, hidden_size=4096, depth=64, tied=False, max_position_embeddings=8192),
}
PARAMETERS = {"7b": 7272665088}  # tiiuae/falcon-mamba-7b

rules = mamba.rules  # the names are Mamba's: its norms have no weights


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    inner: int | None = None,
    state_dim: int = 16,
    dt_rank: int | None = None,
    conv: int = 4,
    conv_bias: bool = True,
    bias: bool = False,
    norm_eps: float = 1e-5,
    mixer_norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` Mamba layers with normalised time steps, B and C; the other arguments are those of Mamba."""
    return mamba.layout(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        inner=inner,
        state_dim=state_dim,
        dt_rank=dt_rank,
        conv=conv,
        conv_bias=conv_bias,
        bias=bias,
        norm_eps=norm_eps,
        tied=tied,
        max_position_embeddings=max_position_embeddings,
        mixer_norm={"norm": "weightless", "norm_eps": mixer_norm_eps},
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "falcon_mamba"


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Falcon-Mamba `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    return layout(**mamba.sizes(config), mixer_norm_eps=config.get("mixer_rms_eps", 1e-6))


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Falcon-Mamba `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that the format cannot express.
    """
    result = {**config, **mamba.fields(decoder, "falcon_mamba"), "architectures": ["FalconMambaForCausalLM"]}
    result["mixer_rms_eps"] = published_format.part_of(decoder, "mixers", "mamba").norm_eps
    return published_format.confirm(result, decoder, _decoder)


_decoder = decoder  # `published` has an argument of that name
