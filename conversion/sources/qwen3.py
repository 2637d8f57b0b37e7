"""Qwen3 (Yang et al. 2025, arXiv 2505.09388) as transformers publishes it: Llama with a norm on each head of queries
and keys, and windows where a config asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.local_global import BIASES, arguments
from zoo.conversion.core.llama_like import (
    QK_NORMS,
    RULES,
    Config,
    LlamaLike,
    qwen_windows,
    window_fields,
    with_mixer,
    with_windows,
)

ARCHITECTURE = "transformer"


def normed(config: Config, layer: Layer) -> Layer:
    """`layer` with Qwen3's norms of queries and keys, and the biases of `attention_bias`."""
    biases = dict.fromkeys(BIASES, bool(config["attention_bias"]))
    return with_mixer(layer, qk_norm="rms", qk_norm_eps=config["rms_norm_eps"], **biases)


def _layers(config: Config, layer: Layer) -> Sequence[Layer]:
    return with_windows(normed(config, layer), qwen_windows(config))


def _fields(decoder: DecoderConfig) -> dict[str, Any]:
    return {**window_fields(decoder), "attention_bias": arguments(decoder)[0].q_bias}


FORMAT = LlamaLike(
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    defaults=dict(
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=32768,
        use_sliding_window=False,
        sliding_window=4096,
        max_window_layers=28,
    ),
    layers=_layers,
    fields=_fields,
    key_rules=lambda config: (*RULES, *QK_NORMS),
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
