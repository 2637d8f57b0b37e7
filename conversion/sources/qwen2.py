"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671) as transformers publishes them: Llama with biases on queries,
keys and values, and windows where a config asks for them."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.architectures.core.config import Layer
from zoo.conversion.core.llama_like import Config, LlamaLike, qwen_windows, window_fields, with_mixer, with_windows

ARCHITECTURE = "transformer"


def _layers(config: Config, layer: Layer) -> Sequence[Layer]:
    return with_windows(with_mixer(layer, q_bias=True, k_bias=True, v_bias=True), qwen_windows(config))


FORMAT = LlamaLike(
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    defaults=dict(
        num_key_value_heads=32,
        max_position_embeddings=32768,
        use_sliding_window=False,
        sliding_window=4096,
        max_window_layers=28,
    ),
    layers=_layers,
    fields=window_fields,
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
