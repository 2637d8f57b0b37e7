"""Mixtral (Jiang et al. 2024, arXiv 2401.04088) as transformers publishes it: Mistral with a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.published import expert_rules, part_of
from zoo.architectures.core.rules import Rule, rename
from zoo.conversion.core.llama_like import (
    ATTENTION,
    CHANNEL,
    EMBEDDING,
    LAYER,
    NORMS,
    Config,
    LlamaLike,
    one_window,
    window_field,
    with_windows,
)
from zoo.errors import ZooError

ARCHITECTURE = "transformer"
_THEIRS = LAYER + "block_sparse_moe."


def _layers(config: Config, layer: Layer) -> Sequence[Layer]:
    moe = dict(
        experts=_experts(config),
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        normalise=True,
    )
    return with_windows(replace(layer, channel="moe", channel_args=moe), one_window(config))


def _experts(config: Config) -> int:
    return int(config.get("num_local_experts") or config.get("num_experts") or 8)


def _rules(config: Config) -> Sequence[Rule]:
    router = rename(_THEIRS + "gate.weight", CHANNEL + "router.weight")
    experts = expert_rules(_THEIRS + "experts.", CHANNEL, _experts(config), ("w1", "w3", "w2"))
    return *EMBEDDING, *NORMS, *ATTENTION, router, *experts


def _fields(decoder: DecoderConfig) -> dict[str, Any]:
    moe = part_of(decoder, "channels", "moe")
    if moe is None:
        raise ZooError("mixtral needs moe channels; save as zoo")
    return {**window_field(decoder), "num_local_experts": moe.experts, "num_experts_per_tok": moe.top_k}


FORMAT = LlamaLike(
    model_type="mixtral",
    causal_lm="MixtralForCausalLM",
    defaults=dict(
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        num_experts_per_tok=2,
    ),
    layers=_layers,
    fields=_fields,
    key_rules=_rules,
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
