"""Ministral (Mistral AI 2024) as transformers publishes it: Mistral with a window in some layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.local_global import FULL, LOCAL
from zoo.conversion.core.llama_like import Config, LlamaLike, window_fields, windows_by_type, with_windows

ARCHITECTURE = "transformer"
DEFAULTS = dict(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)


def _layers(config: Config, layer: Layer) -> Sequence[Layer]:
    kind = FULL if config["sliding_window"] is None else LOCAL
    return with_windows(layer, windows_by_type(config, [kind] * config["num_hidden_layers"]))


def _fields(decoder: DecoderConfig) -> dict[str, Any]:
    found = window_fields(decoder)
    window = found["sliding_window"] or DEFAULTS["sliding_window"]  # transformers asks for one, used or not
    return {"sliding_window": window, "layer_types": found["layer_types"]}


FORMAT = LlamaLike(
    model_type="ministral",
    causal_lm="MinistralForCausalLM",
    defaults=DEFAULTS,
    layers=_layers,
    fields=_fields,
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
