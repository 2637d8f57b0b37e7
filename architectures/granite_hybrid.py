"""Granite 4.0 H (IBM 2025): nine Mamba-2 layers to one of softmax attention without positions, dense or with experts.

Granite's multipliers scale the embedding, every residual branch, the attention scores and the logits. Each layer has a
SwiGLU, or a mixture of experts beside a SwiGLU that takes every token. The format is that of transformers'
`granitemoehybrid`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm, Rope
from zoo.architectures.core.mamba_rules import mamba2_args, mamba2_fields, mamba2_rules
from zoo.architectures.core.published import (
    confirm,
    head_rule,
    linear_rules,
    part_of,
    preimage,
    require,
    rope_parameters,
)
from zoo.architectures.core.published import rope as read_rope
from zoo.architectures.core.rules import Rule, rename, split
from zoo.architectures.mixers.attention import Args as AttentionArgs
from zoo.architectures.mixers.mamba2 import Args as Mamba2Args
from zoo.errors import ZooError

ARCHITECTURE = "granite_hybrid"
LAYER_TYPES = {
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "attention": "attention",
    "full_attention": "attention",
}
HYBRID = (5, 15, 25, 35)  # the attention layers of the published sizes


def _size(hidden_size: int, mamba_heads: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    mamba = dict(heads=mamba_heads, head_dim=64, state_dim=128)
    sizes = dict(vocab_size=100352, hidden_size=hidden_size, depth=40, attention_layers=HYBRID, heads=heads)
    multipliers = dict(embedding_multiplier=12.0, residual_multiplier=0.22, tied=True)
    return {**sizes, "kv_heads": kv_heads, "mamba": mamba, **multipliers, "max_position_embeddings": 131072, **more}


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=3,
        attention_layers=(1,),
        heads=4,
        kv_heads=2,
        mamba=dict(heads=4, head_dim=32, state_dim=16),
        shared_size=96,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "moe_tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=2,
        attention_layers=(1,),
        heads=4,
        kv_heads=2,
        mamba=dict(heads=4, head_dim=32, state_dim=16),
        shared_size=64,
        experts=4,
        top_k=2,
        expert_size=32,
        attention_multiplier=0.25,
    ),
    "3b": _size(2048, 64, 32, 8, shared_size=8192, attention_multiplier=0.015625, logits_scaling=8.0),
    "7b": _size(
        1536,
        48,
        12,
        4,
        shared_size=1024,
        experts=64,
        top_k=6,
        expert_size=512,
        attention_multiplier=0.0078125,
        logits_scaling=6.0,
    ),
    "32b": _size(
        4096,
        128,
        32,
        8,
        shared_size=1536,
        experts=72,
        top_k=10,
        expert_size=768,
        attention_multiplier=0.0078125,
        logits_scaling=16.0,
    ),
}
PARAMETERS = {"3b": 3_190_000_000, "7b": 6_940_000_000, "32b": 32_200_000_000}  # of H-Micro, H-Tiny and H-Small


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    attention_layers: Sequence[int],
    heads: int,
    kv_heads: int,
    mamba: Mapping[str, Any],
    shared_size: int,
    head_dim: int | None = None,
    attention_bias: bool = False,
    experts: int = 0,
    top_k: int = 2,
    expert_size: int | None = None,
    embedding_multiplier: float = 1.0,
    residual_multiplier: float = 1.0,
    attention_multiplier: float | None = None,
    logits_scaling: float = 1.0,
    rope: Rope | None = None,
    norm_eps: float = 1e-5,
    tied: bool = False,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of `mamba2` with arguments `mamba`, but attention at the indices `attention_layers`.

    `shared_size` is the inner width of the SwiGLU that every token goes through; `experts` of `expert_size` each stand
    beside it (0: none), `top_k` per token. `rope` is the attention's table (None: no positions).
    """
    head_dim = head_dim or hidden_size // heads
    attention: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    attention |= dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias"), attention_bias)
    attention |= {"scale": attention_multiplier, "rope": None if rope is None else "default"}
    channel: dict[str, Any] = {"channel": "swiglu", "channel_args": {"intermediate_size": shared_size}}
    if experts:
        sizes = {"experts": experts, "top_k": top_k, "intermediate_size": expert_size, "shared_size": shared_size}
        channel = {"channel": "moe", "channel_args": {**sizes, "softmax_after": True}}
    mixers = ((("attention", attention) if i in attention_layers else ("mamba2", mamba)) for i in range(depth))
    block = {"residual_scale": residual_multiplier}
    layers = (Layer(mixer=name, mixer_args=args, block_args=block, **channel) for name, args in mixers)
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layers),
        embed=Embed(scale=embedding_multiplier),
        head=Head(tied=tied, scale=1 / logits_scaling),
        norm=Norm(eps=norm_eps),
        ropes={} if rope is None else {"default": rope},
        max_position_embeddings=max_position_embeddings,
    )


_LAYER = "model.layers.{i}."
RULES: tuple[Rule, ...] = (
    rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
    rename("model.norm.weight", "model.norm.weight"),
    rename(_LAYER + "input_layernorm.weight", _LAYER + "mixer_norm.weight"),
    rename(_LAYER + "post_attention_layernorm.weight", _LAYER + "channel_norm.weight"),
    *linear_rules(_LAYER + "self_attn.", _LAYER + "mixer.", ("q_proj", "k_proj", "v_proj", "o_proj")),
    rename(_LAYER + "block_sparse_moe.router.layer.weight", _LAYER + "channel.router.weight"),
    rename(_LAYER + "block_sparse_moe.input_linear.weight", _LAYER + "channel.experts.gate_up_proj"),
    rename(_LAYER + "block_sparse_moe.output_linear.weight", _LAYER + "channel.experts.down_proj"),
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "granitemoehybrid"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; the fused projections of Mamba-2 and of the SwiGLU are split."""
    shared = _LAYER + ("channel.shared." if _experts(config) else "channel.")
    return (
        *RULES,
        head_rule(bool(config.get("tie_word_embeddings", False))),
        split(_LAYER + "shared_mlp.input_linear.weight", [f"{shared}{name}_proj.weight" for name in ("gate", "up")]),
        rename(_LAYER + "shared_mlp.output_linear.weight", shared + "down_proj.weight"),
        *mamba2_rules(_LAYER + "mamba.", _LAYER + "mixer.", mamba2_args(config)),
    )


def _experts(config: Mapping[str, Any]) -> int:
    experts = config.get("num_local_experts")
    return 8 if experts is None else experts


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Granite hybrid `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    require(config, "hidden_act", ("silu", "swish"), "silu")
    require(config, "position_embedding_type", ("rope", "nope"), "nope")
    depth, heads = config["num_hidden_layers"], config["num_attention_heads"]
    words = config.get("layer_types") or config.get("layers_block_type") or ["mamba"] * depth
    for word in words:
        require({"model_type": "granitemoehybrid", "layer_types": word}, "layer_types", tuple(LAYER_TYPES), None)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=depth,
        attention_layers=tuple(i for i, word in enumerate(words) if LAYER_TYPES[word] == "attention"),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        attention_bias=bool(config.get("attention_bias", False)),
        mamba=mamba2_args(config),
        shared_size=config.get("shared_intermediate_size", 1024),
        experts=_experts(config),
        top_k=config.get("num_experts_per_tok") or 2,
        expert_size=config.get("intermediate_size", 11008),
        embedding_multiplier=config.get("embedding_multiplier", 1.0),
        residual_multiplier=config.get("residual_multiplier", 1.0),
        attention_multiplier=config.get("attention_multiplier", 1.0),
        logits_scaling=config.get("logits_scaling", 1.0),
        rope=read_rope(config, head_dim) if config.get("position_embedding_type") == "rope" else None,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
    )


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Granite hybrid `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Granite cannot express.
    """
    attention = part_of(decoder, "mixers", "attention") or AttentionArgs(heads=1, head_dim=decoder.hidden_size)
    mamba = part_of(decoder, "mixers", "mamba2")
    if mamba is None and attention.scale is None:
        raise ZooError("Granite H without mamba2 and without multipliers is a plain transformer; save it as llama")
    mamba = mamba or Mamba2Args(heads=2, head_dim=decoder.hidden_size, state_dim=16)
    moe, dense, block = (
        part_of(decoder, kind, name)
        for kind, name in (("channels", "moe"), ("channels", "swiglu"), ("blocks", "pre_norm"))
    )
    if block is None or (moe is None) == (dense is None):
        raise ZooError("Granite needs pre-norm layers with swiglu, or all with a mixture of experts; save as zoo")
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    table = decoder.ropes.get("default")
    result = {
        **config,
        "model_type": "granitemoehybrid",
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "layer_types": ["attention" if layer.mixer == "attention" else "mamba" for layer in decoder.layers],
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.q_bias,
        "hidden_act": "silu",
        "shared_intermediate_size": dense.intermediate_size if moe is None else moe.shared_size,
        "num_local_experts": 0 if moe is None else moe.experts,
        "num_experts_per_tok": 0 if moe is None else moe.top_k,
        "intermediate_size": dense.intermediate_size if moe is None else moe.intermediate_size,
        **mamba2_fields(mamba, decoder.hidden_size),
        "rms_norm_eps": decoder.norm.eps,
        "embedding_multiplier": decoder.embed.scale,
        "residual_multiplier": block.residual_scale,
        "attention_multiplier": scale,
        "logits_scaling": preimage(lambda x: 1 / x, decoder.head.scale, 1 / decoder.head.scale),
        "position_embedding_type": "nope" if table is None else "rope",
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
        "rope_parameters": rope_parameters(table or Rope(dim=2)),
    }
    return confirm(result, decoder, _decoder)
