"""Gemma 3 (Gemma Team 2025, arXiv 2503.19786): five layers that see a window, then one that sees everything.

Windowed and full layers have rotary tables of their own; queries and keys are normalised per head; norms stand before
and after each branch. The format is that of transformers' `gemma3_text`; of a multimodal `gemma3` the language model is
read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures import gemma2
from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm, Rope
from zoo.architectures.core.local_global import (
    BIASES,
    FULL,
    GELUS,
    LOCAL,
    every,
    layer_types,
    softmax_fields,
    whole_rope,
)
from zoo.architectures.core.published import confirm, head_rule, part_of, require, rope_parameters, text_config, towers
from zoo.architectures.core.rules import Rule, rename
from zoo.errors import ZooError

ARCHITECTURE = "gemma3"
_LINEAR = {"rope_type": "linear", "factor": 8.0}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        window=8,
        kinds=(LOCAL, LOCAL, FULL),
    ),
    "270m": dict(
        vocab_size=262144,
        hidden_size=640,
        depth=18,
        heads=4,
        kv_heads=1,
        head_dim=256,
        intermediate_size=2048,
        window=512,
        max_position_embeddings=32768,
    ),
    "1b": dict(
        vocab_size=262144,
        hidden_size=1152,
        depth=26,
        heads=4,
        kv_heads=1,
        head_dim=256,
        intermediate_size=6912,
        window=512,
        max_position_embeddings=32768,
    ),
    "4b": dict(
        vocab_size=262208,
        hidden_size=2560,
        depth=34,
        heads=8,
        kv_heads=4,
        head_dim=256,
        intermediate_size=10240,
        rope_scaling=_LINEAR,
    ),
    "12b": dict(
        vocab_size=262208,
        hidden_size=3840,
        depth=48,
        heads=16,
        kv_heads=8,
        head_dim=256,
        intermediate_size=15360,
        rope_scaling=_LINEAR,
    ),
    "27b": dict(
        vocab_size=262208,
        hidden_size=5376,
        depth=62,
        heads=32,
        kv_heads=16,
        head_dim=128,
        intermediate_size=21504,
        query_pre_attn_scalar=168,
        rope_scaling=_LINEAR,
    ),
}
# embedding and other parameters of the report's table 1, without the vision encoder; 270m: as named
PARAMETERS = {
    "270m": 270_000_000,
    "1b": 302_000_000 + 698_000_000,
    "4b": 675_000_000 + 3_209_000_000,
    "12b": 1_012_000_000 + 10_759_000_000,
    "27b": 1_416_000_000 + 25_600_000_000,
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    window: int | None = 1024,
    kinds: Sequence[str] | None = None,
    query_pre_attn_scalar: int | None = None,
    attention_bias: bool = False,
    logit_softcap: float | None = None,
    tanh: bool = True,
    local_theta: float = 1e4,
    global_theta: float = 1e6,
    rope_scaling: Mapping[str, Any] | None = None,
    ropes: Mapping[str, Rope] | None = None,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 131072,
) -> DecoderConfig:
    """`depth` layers, each sixth with full attention, or as `kinds` (sliding_attention, full_attention) says.

    Scores are divided by the root of `query_pre_attn_scalar` (None: `head_dim`). Windowed layers use the rotary table
    `local`, full ones `global`, which `rope_scaling` stretches; `ropes` gives both tables at once.
    """
    attention = dict(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=(query_pre_attn_scalar or head_dim) ** -0.5,
        qk_norm="rms_one_plus",
        qk_norm_eps=norm_eps,
        **dict.fromkeys(BIASES, attention_bias),
    )
    by_kind = {FULL: attention | {"rope": "global"}, LOCAL: attention | {"rope": "local", "window": window}}
    channel: dict[str, Any] = dict(
        channel="geglu", channel_args=dict(intermediate_size=intermediate_size, tanh=tanh), block="sandwich"
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(
            Layer(mixer="attention", mixer_args=by_kind[kind], **channel) for kind in kinds or every(6, depth)
        ),
        embed=Embed(scale=hidden_size**0.5),
        head=Head(softcap=logit_softcap, tied=tied),
        norm=Norm(kind="rms_one_plus", eps=norm_eps),
        ropes=ropes
        or {
            "local": Rope(dim=head_dim, theta=local_theta),
            "global": Rope(dim=head_dim, theta=global_theta, scaling=rope_scaling or {}),
        },
        max_position_embeddings=max_position_embeddings,
    )


RULES: tuple[Rule, ...] = (
    *gemma2.RULES,
    *(
        rename(f"model.layers.{{i}}.self_attn.{n}.weight", f"model.layers.{{i}}.mixer.{n}.weight")
        for n in ("q_norm", "k_norm")
    ),
)
# what transformers takes for a field that a config leaves out
DEFAULTS: dict[str, Any] = {
    **gemma2.DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") in ("gemma3", "gemma3_text")


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; of a multimodal checkpoint the vision tensors are left out."""
    made = (*RULES, head_rule(bool(text_config(config).get("tie_word_embeddings", True))))
    return towers(made, ("vision_tower", "multi_modal_projector")) if "text_config" in config else made


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Gemma 3 `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    multimodal, config = "text_config" in config, {**DEFAULTS, **text_config(config)}
    require(config, "hidden_activation", tuple(GELUS), "gelu_pytorch_tanh")
    require(config, "use_bidirectional_attention", (False,), False)
    # transformers reads the first nowhere, the second not in its multimodal class
    for name in ("attn_logit_softcapping", "final_logit_softcapping")[: 2 if multimodal else 1]:
        require(config, name, (None,), None)
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate_size=config["intermediate_size"],
        window=config["sliding_window"],
        kinds=layer_types(config, period=6),
        query_pre_attn_scalar=config["query_pre_attn_scalar"],
        attention_bias=config["attention_bias"],
        logit_softcap=config["final_logit_softcapping"],
        tanh=GELUS[config["hidden_activation"]],
        ropes=_ropes(config),
        norm_eps=config["rms_norm_eps"],
        tied=config["tie_word_embeddings"],
        max_position_embeddings=config["max_position_embeddings"],
    )


def _ropes(config: Mapping[str, Any]) -> dict[str, Rope]:
    """Both rotary tables, from `rope_parameters` by kind of layer, or from the older fields."""
    given = config.get("rope_parameters") or {}
    if unknown := sorted(set(given) - {LOCAL, FULL}):
        raise ZooError(f"rope_parameters names {unknown[0]!r}; it must hold those of {LOCAL} and {FULL}")
    base = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_theta")}
    tables = {
        "local": {"rope_theta": config.get("rope_local_base_freq") or 1e4, **(given.get(LOCAL) or {})},
        "global": {
            "rope_theta": config.get("rope_theta") or 1e6,
            **(given.get(FULL) or {}),
            **(config.get("rope_scaling") or {}),
        },
    }
    return {n: whole_rope({**base, "rope_parameters": table}, config["head_dim"]) for n, table in tables.items()}


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `gemma3_text` config of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Gemma 3 cannot express.
    """
    fields, channel = softmax_fields(decoder), part_of(decoder, "channels", "geglu")
    if channel is None or set(decoder.ropes) != {"local", "global"}:
        raise ZooError("Gemma 3 needs geglu channels and the rotary tables local and global; save as zoo")
    result = {
        **config,
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        **fields,
        "hidden_activation": "gelu_pytorch_tanh" if channel.tanh else "gelu",
        "rms_norm_eps": decoder.norm.eps,
        "query_pre_attn_scalar": gemma2.squared(decoder.layers[0].mixer_args),
        "final_logit_softcapping": decoder.head.softcap,
        "rope_parameters": {
            FULL: rope_parameters(decoder.ropes["global"]),
            LOCAL: rope_parameters(decoder.ropes["local"]),
        },
    }
    return confirm(result, decoder, _decoder)
