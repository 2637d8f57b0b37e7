"""Qwen3 with experts (Yang et al. 2025, arXiv 2505.09388) as transformers publishes it: a mixture of experts in all
layers or some, and one window in all layers or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.local_global import arguments
from zoo.architectures.core.published import expert_rules, part_of
from zoo.architectures.core.rules import Rule, rename
from zoo.conversion.core.llama_like import (
    CHANNEL,
    LAYER,
    QK_NORMS,
    RULES,
    Config,
    LlamaLike,
    one_window,
    window_field,
    with_windows,
)
from zoo.conversion.sources.qwen3 import normed
from zoo.errors import ZooError

ARCHITECTURE = "transformer"


def _layers(config: Config, layer: Layer) -> Sequence[Layer]:
    moe = dict(
        experts=_experts(config),
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        normalise=bool(config["norm_topk_prob"]),
    )
    window = config["sliding_window"] if config["use_sliding_window"] else None
    layers = with_windows(normed(config, layer), one_window({**config, "sliding_window": window}))
    return [
        replace(one, channel="moe", channel_args=moe) if _sparse(config, i) else one for i, one in enumerate(layers)
    ]


def _experts(config: Config) -> int:
    given = config.get("num_experts", config.get("num_local_experts"))
    return 128 if given is None else int(given)


def _sparse(config: Config, index: int) -> bool:
    chosen = index not in (config["mlp_only_layers"] or ()) and (index + 1) % config["decoder_sparse_step"] == 0
    return chosen and _experts(config) > 0


def _rules(config: Config) -> Sequence[Rule]:
    router = rename(LAYER + "mlp.gate.weight", CHANNEL + "router.weight")
    experts = expert_rules(LAYER + "mlp.experts.", CHANNEL, _experts(config)) if _experts(config) else ()
    return *RULES, *QK_NORMS, router, *experts


def _fields(decoder: DecoderConfig) -> dict[str, Any]:
    moe, dense = part_of(decoder, "channels", "moe"), part_of(decoder, "channels", "swiglu")
    if moe is None:
        raise ZooError("qwen3_moe needs moe channels; save as zoo")
    return {
        **(window := window_field(decoder)),
        "use_sliding_window": window["sliding_window"] is not None,
        "attention_bias": arguments(decoder)[0].q_bias,
        "intermediate_size": (dense or moe).intermediate_size,
        "moe_intermediate_size": moe.intermediate_size,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(decoder.layers) if layer.channel == "swiglu"],
    }


FORMAT = LlamaLike(
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    defaults=dict(
        num_key_value_heads=4,
        max_position_embeddings=32768,
        use_sliding_window=False,
        sliding_window=4096,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=None,
    ),
    layers=_layers,
    fields=_fields,
    key_rules=_rules,
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
