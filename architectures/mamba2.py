"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): state-space layers with one decay per head, no attention, no channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core import published as published_format
from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.mamba_rules import backbone_rules, mamba2_rules, published_limit, time_step_limit
from zoo.architectures.core.rules import Rule
from zoo.architectures.core.stack import uniform
from zoo.errors import ZooError

ARCHITECTURE = "mamba2"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, head_dim=32, state_dim=16),
    # state-spaces/mamba2-130m to mamba2-2.7b
    "130m": dict(vocab_size=50288, hidden_size=768, depth=24),
    "370m": dict(vocab_size=50288, hidden_size=1024, depth=48),
    "780m": dict(vocab_size=50288, hidden_size=1536, depth=48),
    "1b3": dict(vocab_size=50288, hidden_size=2048, depth=48),
    "2b7": dict(vocab_size=50288, hidden_size=2560, depth=64),
}
# transformers' Mamba2ForCausalLM with the published sizes (the hub's names are rounded)
PARAMETERS = {"130m": 128989632, "370m": 368346624, "780m": 780161280, "1b3": 1343757312, "2b7": 2702599680}
BIASED = ("z", "x", "B", "C", "dt", "out")


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int | None = None,
    head_dim: int = 64,
    state_dim: int = 128,
    groups: int = 1,
    conv: int = 4,
    conv_bias: bool = True,
    bias: bool = False,
    time_step_limit: Sequence[float | None] | None = None,
    norm_groups: int = 1,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` Mamba-2 layers; `heads` None makes up twice the hidden size."""
    mixer = dict(
        heads=heads or 2 * hidden_size // head_dim,
        head_dim=head_dim,
        state_dim=state_dim,
        groups=groups,
        conv=conv,
        conv_bias=conv_bias,
        biases=BIASED if bias else (),
        time_step_limit=None if time_step_limit is None else tuple(time_step_limit),
        norm_groups=norm_groups,
        norm_eps=norm_eps,
    )
    return uniform(
        "mamba2",
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
    return config.get("model_type") == "mamba2"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; the fused projections and convolutions are split."""
    tied = bool(config.get("tie_word_embeddings", False))
    args = decoder(config).layers[0].mixer_args
    return *backbone_rules(tied), *mamba2_rules("backbone.layers.{i}.mixer.", "model.layers.{i}.mixer.", args)


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Mamba-2 `config.json`.

    The output norm is over all channels, also where `n_groups` is above 1: that is what transformers computes.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    published_format.require(config, "hidden_act", ("silu", "swish"), "silu")
    published_format.require(config, "conv_kernel", range(1, 1 << 16), 4)
    heads, head_dim = config.get("num_heads", 128), config.get("head_dim", 64)
    if heads * head_dim != (inner := config.get("expand", 2) * config["hidden_size"]):
        raise ZooError(f"num_heads {heads} of head_dim {head_dim} must make up expand * hidden_size, {inner} channels")
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=heads,
        head_dim=head_dim,
        state_dim=config.get("state_size", 128),
        groups=config.get("n_groups", 8),
        conv=config.get("conv_kernel", 4),
        conv_bias=bool(config.get("use_conv_bias", True)),
        bias=bool(config.get("use_bias", False)),
        time_step_limit=time_step_limit(config.get("time_step_limit")),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
    )


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Mamba-2 `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that the format cannot express.
    """
    args = published_format.part_of(decoder, "mixers", "mamba2")
    if args is None or args.heads * args.head_dim % decoder.hidden_size:
        raise ZooError("mamba2 needs layers of mamba2 whose heads make up a multiple of hidden_size")
    result = {
        **config,
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "num_heads": args.heads,
        "head_dim": args.head_dim,
        "expand": args.heads * args.head_dim // decoder.hidden_size,
        "state_size": args.state_dim,
        "n_groups": args.groups,
        "conv_kernel": args.conv,
        "use_conv_bias": args.conv_bias,
        "use_bias": "z" in args.biases,
        "hidden_act": "silu",
        "time_step_limit": published_limit(args.time_step_limit),
        "layer_norm_epsilon": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
    }
    return published_format.confirm(result, decoder, _decoder)


_decoder = decoder  # `published` has an argument of that name
