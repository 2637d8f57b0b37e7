"""Granite 3 (IBM 2024) as transformers publishes it: Llama with multipliers on the embedding, the residual branches,
the scores and the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Layer
from zoo.architectures.core.local_global import arguments
from zoo.architectures.core.published import part_of, preimage
from zoo.conversion.core.llama_like import Config, LlamaLike, bias_fields, with_biases, with_mixer
from zoo.errors import ZooError

ARCHITECTURE = "transformer"


def _layers(config: Config, layer: Layer) -> Sequence[Layer]:
    scaled = with_mixer(with_biases(config, layer), scale=float(config["attention_multiplier"]))
    block = {"residual_scale": float(config["residual_multiplier"])}
    return [replace(scaled, block_args=block)] * config["num_hidden_layers"]


def _finish(config: Config, decoder: DecoderConfig) -> DecoderConfig:
    head = replace(decoder.head, scale=1 / config["logits_scaling"])
    return replace(decoder, embed=Embed(scale=float(config["embedding_multiplier"])), head=head)


def _fields(decoder: DecoderConfig) -> dict[str, Any]:
    scale, block = arguments(decoder)[0].scale, part_of(decoder, "blocks", "pre_norm")
    if scale is None or block is None:
        raise ZooError("a pre-norm decoder without an attention multiplier is no granite; save it as llama")
    return {
        **bias_fields(decoder),
        "embedding_multiplier": decoder.embed.scale,
        "residual_multiplier": block.residual_scale,
        "attention_multiplier": scale,
        "logits_scaling": preimage(lambda x: 1 / x, decoder.head.scale, 1 / decoder.head.scale),
    }


FORMAT = LlamaLike(
    model_type="granite",
    causal_lm="GraniteForCausalLM",
    defaults=dict(embedding_multiplier=1.0, residual_multiplier=1.0, attention_multiplier=1.0, logits_scaling=1.0),
    layers=_layers,
    finish=_finish,
    fields=_fields,
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
