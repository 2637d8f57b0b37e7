"""Code World Model (Meta FAIR 2025, arXiv 2510.02387) as transformers publishes it: Llama with a window in some
layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Layer, Rope
from zoo.architectures.core.local_global import FULL, LOCAL, whole_rope
from zoo.conversion.core.llama_like import Config, LlamaLike, bias_fields, window_fields, windows_by_type, with_windows
from zoo.errors import ZooError

ARCHITECTURE = "transformer"
ROPE = dict(
    rope_type="llama3",
    rope_theta=1e6,
    factor=16.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
DEFAULTS = dict(
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    sliding_window=8192,
)


def _layers(config: Config, layer: Layer) -> Sequence[Layer]:
    kinds = [LOCAL if index % 4 else FULL for index in range(config["num_hidden_layers"])]
    biased = replace(layer, channel_args={**layer.channel_args, "bias": bool(config["mlp_bias"])})
    return with_windows(biased, windows_by_type(config, kinds))


def _table(config: Config, head_dim: int) -> Rope:
    given = config.get("rope_scaling") or config.get("rope_parameters") or ROPE
    return whole_rope({**config, "rope_parameters": given, "rope_scaling": None}, head_dim)


def _fields(decoder: DecoderConfig) -> dict[str, Any]:
    if decoder.hidden_size % decoder.layers[0].mixer_args["heads"]:
        raise ZooError(f"cwm needs a hidden_size ({decoder.hidden_size}) that is a multiple of the heads; save as zoo")
    found = window_fields(decoder)
    if found["sliding_window"] is None:
        raise ZooError("cwm without a window is llama; save as llama")
    biases = bias_fields(decoder)
    return {
        "sliding_window": found["sliding_window"],
        "layer_types": found["layer_types"],
        "mlp_bias": biases["mlp_bias"],
    }


FORMAT = LlamaLike(
    model_type="cwm",
    causal_lm="CwmForCausalLM",
    defaults=DEFAULTS,
    layers=_layers,
    table=_table,
    fields=_fields,
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
