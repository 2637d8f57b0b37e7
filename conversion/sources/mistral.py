"""Mistral 7B (Jiang et al. 2023, arXiv 2310.06825) as transformers publishes it: Llama with a window in all layers."""

from __future__ import annotations

from zoo.conversion.core.llama_like import LlamaLike, one_window, window_field, with_windows

ARCHITECTURE = "transformer"
FORMAT = LlamaLike(
    model_type="mistral",
    causal_lm="MistralForCausalLM",
    defaults=dict(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096),
    layers=lambda config, layer: with_windows(layer, one_window(config)),
    fields=window_field,
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
