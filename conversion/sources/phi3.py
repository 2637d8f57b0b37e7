"""Phi-3 and Phi-4 (Abdin et al. 2024, arXiv 2404.14219 and 2412.08905) as transformers publishes them: Llama with
fused projections, rotation of a share of each head, one window in all layers or none, and LongRoPE where the context
was stretched (its older names are su and yarn).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Rope
from zoo.architectures.core.local_global import arguments
from zoo.architectures.core.published import linear_rules, require, rope, rope_parameters
from zoo.architectures.core.rules import Rule, split
from zoo.conversion.core.llama_like import (
    CHANNEL,
    EMBEDDING,
    LAYER,
    MIXER,
    NORMS,
    Config,
    LlamaLike,
    one_window,
    window_field,
    with_windows,
)

ARCHITECTURE = "transformer"
LONG, OLDER = "longrope", ("su", "yarn")
LENGTH = "original_max_position_embeddings"


def _table(config: Config, head_dim: int) -> Rope:
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    require({**config, "rope_type": kind}, "rope_type", ("default", LONG, *OLDER), "default")
    given["rope_type"] = LONG if kind in OLDER else kind
    return rope({**config, "rope_scaling": given}, head_dim)


def _rules(config: Config) -> Sequence[Rule]:
    heads = config["num_attention_heads"]
    head_dim = config["head_dim"] or config["hidden_size"] // heads
    sizes = [head_dim * count for count in (heads, *2 * (config["num_key_value_heads"] or heads,))]
    return (
        *EMBEDDING,
        *NORMS,
        split(LAYER + "self_attn.qkv_proj.weight", [f"{MIXER}{n}_proj.weight" for n in "qkv"], sizes),
        split(LAYER + "mlp.gate_up_proj.weight", [f"{CHANNEL}{n}_proj.weight" for n in ("gate", "up")]),
        *linear_rules(LAYER + "self_attn.", MIXER, ("o_proj",)),
        *linear_rules(LAYER + "mlp.", CHANNEL, ("down_proj",)),
    )


def _fields(decoder: DecoderConfig) -> dict[str, Any]:
    table = rope_parameters(decoder.ropes["default"], arguments(decoder)[0].head_dim)
    length = {LENGTH: table[LENGTH]} if LENGTH in table else {}  # transformers reads it there
    return {**window_field(decoder), "rope_parameters": table, **length}


FORMAT = LlamaLike(
    model_type="phi3",
    causal_lm="Phi3ForCausalLM",
    defaults={"max_position_embeddings": 4096, LENGTH: 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
    layers=lambda config, layer: with_windows(layer, one_window(config)),
    table=_table,
    fields=_fields,
    key_rules=_rules,
)
matches, rules, decoder, published = FORMAT.matches, FORMAT.rules, FORMAT.decoder, FORMAT.published
