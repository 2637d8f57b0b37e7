"""SmolLM3 (Hugging Face 2025) as transformers publishes it: Llama in which every fourth layer has no positions (Yang et
al. 2025, arXiv 2501.18795), with a window there where a config asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.local_global import FULL, LOCAL, arguments
from zoo.conversion.core.llama_like import (
    Config,
    LlamaLike,
    bias_fields,
    window_fields,
    windows_by_type,
    with_biases,
    with_mixer,
    with_windows,
)
from zoo.errors import ZooError

ARCHITECTURE = "transformer"


def _layers(config: Config, layer: Layer) -> Sequence[Layer]:
    rotated = _rotated(config)
    used = config["use_sliding_window"] and config["sliding_window"] is not None
    windows = windows_by_type(config, [LOCAL if used and not turns else FULL for turns in rotated])
    layers = with_windows(with_biases(config, layer), windows)
    return [one if turns else with_mixer(one, rope=None) for one, turns in zip(layers, rotated, strict=True)]


def _rotated(config: Config) -> list[bool]:
    """Whether each layer has RoPE: what `no_rope_layers` says (1: it has)."""
    depth, period, given = config["num_hidden_layers"], config["no_rope_layer_interval"], config["no_rope_layers"]
    if given is None:
        return [(index + 1) % period != 0 for index in range(depth)]
    if len(given) < depth:
        raise ZooError(f"no_rope_layers has {len(given)} entries; it must have one for each of {depth} layers")
    return [bool(turns) for turns in given[:depth]]


def _fields(decoder: DecoderConfig) -> dict[str, Any]:
    rotated = [int(args.rope is not None) for args in arguments(decoder)]
    return {**window_fields(decoder), **bias_fields(decoder), "no_rope_layers": rotated}


FORMAT = LlamaLike(
    model_type="smollm3",
    causal_lm="SmolLM3ForCausalLM",
    defaults=dict(
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_theta=2e6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        sliding_window=None,
        no_rope_layers=None,
        no_rope_layer_interval=4,
    ),
    layers=_layers,
    fields=_fields,
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
