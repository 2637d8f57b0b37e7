"""Mamba (Gu and Dao 2023, arXiv 2312.00752): selective state spaces throughout, no attention and no other channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core import published as published_format
from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.mamba_rules import backbone_rules, mamba_rules
from zoo.architectures.core.rules import Rule
from zoo.architectures.core.stack import uniform
from zoo.errors import ZooError

ARCHITECTURE = "mamba"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, state_dim=8),
    # state-spaces/mamba-130m to mamba-2.8b
    "130m": dict(vocab_size=50280, hidden_size=768, depth=24),
    "370m": dict(vocab_size=50280, hidden_size=1024, depth=48),
    "790m": dict(vocab_size=50280, hidden_size=1536, depth=48),
    "1b4": dict(vocab_size=50280, hidden_size=2048, depth=48),
    "2b8": dict(vocab_size=50280, hidden_size=2560, depth=64),
}
# transformers' MambaForCausalLM with the published configs (the hub's names are rounded)
PARAMETERS = {"130m": 129135360, "370m": 371516416, "790m": 793204224, "1b4": 1372178432, "2b8": 2768345600}


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
    tied: bool = True,
    max_position_embeddings: int = 2048,
    mixer_norm: Mapping[str, Any] | None = None,
) -> DecoderConfig:
    """`depth` Mamba layers of `inner` channels (None: twice the hidden size) with `state_dim` states each.

    `dt_rank` None is a sixteenth of the hidden size, rounded up; `mixer_norm` has the mixer's `norm` and `norm_eps`.
    """
    mixer = dict(
        inner=inner or 2 * hidden_size,
        state_dim=state_dim,
        dt_rank=dt_rank or -(-hidden_size // 16),
        conv=conv,
        conv_bias=conv_bias,
        bias=bias,
        **(mixer_norm or {}),
    )
    return uniform(
        "mamba",
        mixer,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        norm=Norm(eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "mamba"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; the head is tied unless the config says otherwise."""
    tied = config.get("tie_word_embeddings", True)
    return *backbone_rules(tied), *mamba_rules("backbone.layers.{i}.mixer.", "model.layers.{i}.mixer.")


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `layout` from a published config of Mamba or Falcon-Mamba."""
    published_format.require(config, "hidden_act", ("silu", "swish"), "silu")
    width, rank = config["hidden_size"], config.get("time_step_rank", "auto")
    published_format.require(config, "conv_kernel", range(1, 1 << 16), 4)
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": width,
        "depth": config["num_hidden_layers"],
        "inner": config.get("intermediate_size") or int(config.get("expand", 2) * width),
        "state_dim": config.get("state_size", 16),
        "dt_rank": None if rank == "auto" else rank,
        "conv": config.get("conv_kernel", 4),
        "conv_bias": bool(config.get("use_conv_bias", True)),
        "bias": bool(config.get("use_bias", False)),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "tied": bool(config.get("tie_word_embeddings", True)),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
    }


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Mamba `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    return layout(**sizes(config))


def fields(decoder: DecoderConfig, kind: str) -> dict[str, Any]:
    """The fields of a published config that `sizes` reads, from a decoder; `kind` is its model type.

    Raises:
        ZooError: a decoder that is not Mamba throughout.
    """
    args = published_format.part_of(decoder, "mixers", "mamba")
    if args is None:
        raise ZooError(f"{kind} needs layers of mamba")
    return {
        "model_type": kind,
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "expand": max(1, args.inner // decoder.hidden_size),  # transformers reads intermediate_size where there is one
        "intermediate_size": args.inner,
        "state_size": args.state_dim,
        "time_step_rank": args.dt_rank or "auto",
        "conv_kernel": args.conv,
        "use_conv_bias": args.conv_bias,
        "use_bias": args.bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": decoder.norm.eps,
        "tie_word_embeddings": decoder.head.tied,
        "max_position_embeddings": decoder.max_position_embeddings,
    }


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Mamba `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that the format cannot express.
    """
    result = {**config, **fields(decoder, "mamba"), "architectures": ["MambaForCausalLM"]}
    return published_format.confirm(result, decoder, _decoder)


_decoder = decoder  # `published` has an argument of that name
