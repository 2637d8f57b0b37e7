"""Qwen3.5 (Qwen Team 2026): the language models of the series, Gated DeltaNet and gated attention as in Qwen3-Next.

Channels are SwiGLU or, in the larger models, a mixture of experts. The formats are transformers' `qwen3_5_text` and
`qwen3_5_moe_text`, and the language model inside the multimodal `qwen3_5` and `qwen3_5_moe`. Rotary positions have
three parts (time, height, width), which are equal for text: then they are the plain ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures import qwen3_next
from zoo.architectures.core import delta_hybrid
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.published import confirm, require, text_config, towers
from zoo.architectures.core.rules import Rule, alias, rename, split
from zoo.architectures.qwen3_next import EXPERTS, layout

__all__ = ["ARCHITECTURE", "PARAMETERS", "PRESETS", "decoder", "layout", "matches", "published", "rules"]

ARCHITECTURE = "qwen3_5"
MODEL_TYPES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe")
SIZES: dict[str, Any] = dict(vocab_size=248320, head_dim=256)


def delta(value_heads: int) -> dict[str, int]:
    """The linear attention of the published sizes."""
    return dict(heads=16, head_dim=128, value_heads=value_heads, value_dim=128)


def dense(width: int, depth: int, heads: int, kv_heads: int, values: int, inner: int, tied: bool) -> dict[str, Any]:
    """A published size with SwiGLU channels."""
    attention = dict(heads=heads, kv_heads=kv_heads, linear=delta(values))
    return dict(hidden_size=width, depth=depth, intermediate_size=inner, tied=tied, **attention, **SIZES)


def routed(width: int, depth: int, heads: int, values: int, experts: int, top_k: int, inner: int) -> dict[str, Any]:
    """A published size with a mixture of experts."""
    moe = dict(experts=experts, top_k=top_k, intermediate_size=inner, shared_size=inner, **EXPERTS)
    attention = dict(heads=heads, kv_heads=2, linear=delta(values))
    return dict(hidden_size=width, depth=depth, experts=moe, **attention, **SIZES)


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=4,
        heads=4,
        kv_heads=2,
        head_dim=16,
        linear=dict(heads=2, head_dim=16, value_heads=4, value_dim=16),
        intermediate_size=96,
        tied=True,
    ),
    "0b8": dense(1024, 24, 8, 2, 16, 3584, True),
    "2b": dense(2048, 24, 8, 2, 16, 6144, True),
    "4b": dense(2560, 32, 16, 4, 32, 9216, True),
    "9b": dense(4096, 32, 16, 4, 32, 12288, False),
    "27b": dense(5120, 64, 24, 4, 48, 17408, False),
    "35b_a3b": routed(2048, 40, 16, 32, 256, 8, 512),
    "122b_a10b": routed(3072, 48, 32, 64, 256, 8, 1024),
    "397b_a17b": routed(4096, 60, 32, 64, 512, 10, 1024),
}


# transformers' class of the published text configs; the names of the models count their vision towers too
PARAMETERS = {
    "0b8": 752_393_024,
    "2b": 1_881_825_088,
    "4b": 4_205_751_296,
    "9b": 8_953_803_264,
    "27b": 26_895_998_464,
    "35b_a3b": 34_660_610_688,
    "122b_a10b": 122_111_526_912,
    "397b_a17b": 396_346_350_336,
}


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") in MODEL_TYPES


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; those of a multimodal checkpoint leave out its vision tower."""
    text = text_config(config)
    theirs, ours = "model.layers.{i}.linear_attn.", "model.layers.{i}.mixer."
    keys, values = delta_hybrid.widths(delta_hybrid.linear_args(text, qwen3_next.DEFAULTS))
    single = {"in_proj_z": "g_proj", "in_proj_b": "b_proj", "in_proj_a": "a_proj"}
    projections = (
        split(theirs + "in_proj_qkv.weight", [f"{ours}{n}_proj.weight" for n in ("q", "k", "v")], (keys, keys, values)),
        *(rename(f"{theirs}{name}.weight", f"{ours}{mine}.weight") for name, mine in single.items()),
    )
    stacked = ("gate_up_proj", "down_proj")  # experts as the hub's checkpoints have them; transformers writes each
    experts = "model.layers.{i}.mlp.experts.", "model.layers.{i}.channel.experts."
    found = (
        *qwen3_next.layer_rules(text, projections),
        *(alias(rename(experts[0] + name, experts[1] + name)) for name in stacked),
    )
    return found if text == config else towers(found, ("visual",))


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for the `config.json` of a Qwen3.5 checkpoint.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    text = text_config(config)
    require(text, "attn_output_gate", (True,), True)
    return qwen3_next.read(text, qwen3_next.expert_args(text, 8) if "moe" in config["model_type"] else None)


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Qwen3.5 cannot express.
    """
    experts = qwen3_next.expert_fields(decoder)
    result = {
        **qwen3_next.fields(decoder, config),
        "model_type": "qwen3_5_moe_text" if experts else "qwen3_5_text",
        "architectures": ["Qwen3_5MoeForCausalLM" if experts else "Qwen3_5ForCausalLM"],
        **{name: value for name, value in experts.items() if name != "norm_topk_prob"},
    }
    return confirm(result, decoder, _decoder)
