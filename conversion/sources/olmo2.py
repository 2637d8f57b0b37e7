"""OLMo 2 (Walsh et al. 2024, arXiv 2501.00656) as transformers publishes it: norms after each branch, and over all
queries and all keys at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.local_global import BIASES, arguments
from zoo.architectures.core.rules import rename
from zoo.conversion.core.llama_like import ATTENTION, EMBEDDING, LAYER, MLP, QK_NORMS, Config, LlamaLike, with_mixer

ARCHITECTURE = "transformer"
RULES = (
    *EMBEDDING,
    rename(LAYER + "post_attention_layernorm.weight", LAYER + "mixer_norm.weight"),
    rename(LAYER + "post_feedforward_layernorm.weight", LAYER + "channel_norm.weight"),
    *ATTENTION,
    *QK_NORMS,
    *MLP,
)


def _layers(config: Config, layer: Layer) -> Sequence[Layer]:
    norms = dict(qk_norm="rms", qk_norm_full=True, qk_norm_eps=config["rms_norm_eps"])
    biases = dict.fromkeys(BIASES, bool(config["attention_bias"]))
    return [replace(with_mixer(layer, **norms, **biases), block="post_norm")] * config["num_hidden_layers"]


def _fields(decoder: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": arguments(decoder)[0].q_bias}


FORMAT = LlamaLike(
    model_type="olmo2",
    causal_lm="Olmo2ForCausalLM",
    defaults=dict(rms_norm_eps=1e-5),
    layers=_layers,
    fields=_fields,
    key_rules=lambda config: RULES,
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
