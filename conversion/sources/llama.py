"""Llama (Touvron et al. 2023, arXiv 2302.13971; Llama 3, arXiv 2407.21783) as transformers publishes it."""

from __future__ import annotations

from zoo.conversion.core.llama_like import LlamaLike, bias_fields, with_biases

ARCHITECTURE = "transformer"
FORMAT = LlamaLike(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    layers=lambda config, layer: [with_biases(config, layer)] * config["num_hidden_layers"],
    fields=bias_fields,
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
