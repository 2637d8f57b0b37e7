"""Qwen3-Next (Qwen Team 2025): three Gated DeltaNet layers, then one of gated attention, over a mixture of experts.

Attention turns a quarter of each head by position, normalises queries and keys per head and gates its output; norms
have a weight around zero. The format is that of transformers' `qwen3_next`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core import delta_hybrid
from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.published import confirm, expert_rules, head_rule, linear_rules, part_of, rope_parameters
from zoo.architectures.core.published import rope as read_rope
from zoo.architectures.core.rules import Rule, depthwise, drop, rename, unweave, within
from zoo.errors import ZooError

ARCHITECTURE = "qwen3_next"
EXPERTS = {"normalise": True, "shared_gate": True}
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
        experts=dict(experts=4, top_k=3, intermediate_size=32, shared_size=32, **EXPERTS),
        dense_layers=(0,),
    ),
    "80b_a3b": dict(
        vocab_size=151936,
        hidden_size=2048,
        depth=48,
        heads=16,
        kv_heads=2,
        head_dim=256,
        linear=dict(heads=16, head_dim=128, value_heads=32, value_dim=128),
        experts=dict(experts=512, top_k=10, intermediate_size=512, shared_size=512, **EXPERTS),
    ),
}
PARAMETERS = {"80b_a3b": 79_674_391_296}  # transformers' class of the published config
BIASES = ("q_bias", "k_bias", "v_bias", "o_bias")
DEFAULTS = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    linear: Mapping[str, Any],
    intermediate_size: int | None = None,
    experts: Mapping[str, Any] | None = None,
    dense_layers: Sequence[int] = (),
    attention_layers: Sequence[int] | None = None,
    attention_bias: bool = False,
    rope: Rope | None = None,
    norm_eps: float = 1e-6,
    tied: bool = False,
    max_position_embeddings: int = 262144,
) -> DecoderConfig:
    """`depth` layers of `gated_delta_net` with arguments `linear`, but attention in every fourth one, or those at the
    indices `attention_layers`.

    Channels are `moe` with the arguments `experts`; at the indices `dense_layers`, and everywhere without `experts`,
    `swiglu` of `intermediate_size`.
    """
    if intermediate_size is None and (experts is None or dense_layers):
        raise ZooError("intermediate_size was None; layers without experts need one")
    chosen = range(3, depth, 4) if attention_layers is None else attention_layers
    attention: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rope": "default"}
    attention |= {"qk_norm": "rms_one_plus", "qk_norm_eps": norm_eps, "output_gate": True}
    attention |= dict.fromkeys(BIASES, attention_bias)
    delta = {**linear, "norm_eps": norm_eps}

    def layer(index: int) -> Layer:
        mixer, args = ("attention", attention) if index in chosen else ("gated_delta_net", delta)
        if experts is not None and index not in dense_layers:
            return Layer(mixer=mixer, mixer_args=args, channel="moe", channel_args=experts)
        dense = {"intermediate_size": intermediate_size}
        return Layer(mixer=mixer, mixer_args=args, channel="swiglu", channel_args=dense)

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(i) for i in range(depth)),
        head=Head(tied=tied),
        norm=Norm(kind="rms_one_plus", eps=norm_eps),
        ropes={"default": rope or Rope(dim=head_dim // 4, theta=1e7)},
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "qwen3_next"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules: the rows of a fused projection are sorted by key head, `[q, k, v, z]` and `[b, a]` of each."""
    theirs, ours = "model.layers.{i}.linear_attn.", "model.layers.{i}.mixer."
    args = delta_hybrid.linear_args(config, DEFAULTS)
    values = args["value_heads"] // args["heads"]  # value heads of a key head
    rows = (args["head_dim"], args["head_dim"], values * args["value_dim"], values * args["value_dim"])
    projections = [f"{ours}{name}_proj.weight" for name in ("q", "k", "v", "g", "b", "a")]
    fused = (
        unweave(theirs + "in_proj_qkvz.weight", projections[:4], rows, args["heads"]),
        unweave(theirs + "in_proj_ba.weight", projections[4:], (values, values), args["heads"]),
    )
    return layer_rules(config, fused)


def layer_rules(config: Mapping[str, Any], projections: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of a Qwen hybrid; `projections` are those that enter its linear attention."""
    theirs = ours = "model.layers.{i}."
    linear, softmax = (indices(config, kind) for kind in (delta_hybrid.LINEAR, delta_hybrid.SOFTMAX))
    keys, values = delta_hybrid.widths(delta_hybrid.linear_args(config, DEFAULTS))
    names = {
        "input_layernorm.weight": "mixer_norm.weight",
        "post_attention_layernorm.weight": "channel_norm.weight",
        "mlp.gate.weight": "channel.router.weight",
        "mlp.shared_expert_gate.weight": "channel.shared_gate.weight",
    }
    delta = {"A_log": "A_log", "dt_bias": "dt_bias", "norm.weight": "o_norm", "out_proj.weight": "o_proj.weight"}
    convolutions = [f"{ours}mixer.convs.{name}" for name in ("q", "k", "v")]
    attention = linear_rules(theirs + "self_attn.", ours + "mixer.", ("q_proj", "k_proj", "v_proj", "o_proj"))
    norms = (rename(f"{theirs}self_attn.{name}.weight", f"{ours}mixer.{name}.weight") for name in ("q_norm", "k_norm"))
    dense, experts = ("gate_proj", "up_proj", "down_proj"), config.get("num_experts")
    return (
        rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
        rename("model.norm.weight", "model.norm.weight"),
        head_rule(bool(config.get("tie_word_embeddings", False))),
        *(rename(theirs + name, ours + mine) for name, mine in names.items()),
        *within(softmax, (*attention, *norms)),
        *within(linear, projections),
        *within(linear, (rename(f"{theirs}linear_attn.{name}", f"{ours}mixer.{mine}") for name, mine in delta.items())),
        depthwise(theirs + "linear_attn.conv1d.weight", convolutions, (keys, keys, values)),
        *linear_rules(theirs + "mlp.", ours + "channel.", dense),
        *linear_rules(theirs + "mlp.shared_expert.", ours + "channel.shared.", dense),
        *(expert_rules(theirs + "mlp.experts.", ours + "channel.", experts) if experts else ()),
        drop("mtp.{any}"),  # heads that guess further tokens, for speculative decoding
    )


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Qwen3-Next `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    depth, step = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
    named = config.get("mlp_only_layers") or ()
    dense = [i for i in range(depth) if i in named or (i + 1) % step]
    routed = bool(config.get("num_experts", 512)) and len(dense) < depth
    return read(config, expert_args(config, 10) if routed else None, dense if routed else ())


def expert_args(config: Mapping[str, Any], top_k: int) -> dict[str, Any]:
    """The arguments of `moe`; `top_k` is transformers' default."""
    return {
        "experts": config["num_experts"],
        "top_k": config.get("num_experts_per_tok", top_k),
        "intermediate_size": config.get("moe_intermediate_size", 512),
        "shared_size": config.get("shared_expert_intermediate_size", 512),
        "shared_gate": True,
        "normalise": bool(config.get("norm_topk_prob", True)),
    }


def read(
    config: Mapping[str, Any], experts: Mapping[str, Any] | None, dense_layers: Sequence[int] = ()
) -> DecoderConfig:
    """The decoder of a Qwen hybrid's config, with these channels."""
    head_dim, softmax = config.get("head_dim", 256), indices(config, delta_hybrid.SOFTMAX)
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        linear=delta_hybrid.linear_args(config, DEFAULTS),
        intermediate_size=config.get("intermediate_size"),
        experts=experts,
        dense_layers=dense_layers,
        attention_layers=softmax,
        attention_bias=bool(config.get("attention_bias", False)),
        rope=read_rope(config, head_dim, partial=0.25),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings", 32768),
    )


def indices(config: Mapping[str, Any], kind: str) -> list[int]:
    """The layers of one kind."""
    default = delta_hybrid.every(config.get("full_attention_interval", 4), config["num_hidden_layers"])
    return [i for i, found in enumerate(delta_hybrid.layer_types(config, default)) if found == kind]


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Qwen3-Next `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Qwen3-Next cannot express.
    """
    result = {
        **fields(decoder, config),
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        **expert_fields(decoder),
        "mlp_only_layers": [i for i, layer in enumerate(decoder.layers) if layer.channel == "swiglu"],
        "decoder_sparse_step": 1,
    }
    if "num_experts" not in result:
        result |= {"num_experts": 0, "mlp_only_layers": []}
    return confirm(result, decoder, _decoder)


def fields(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config.json` that the Qwen hybrids share."""
    kinds = delta_hybrid.types_of(decoder, "gated_delta_net", "attention")
    attention = part_of(decoder, "mixers", "attention")
    linear, dense = part_of(decoder, "mixers", "gated_delta_net"), part_of(decoder, "channels", "swiglu")
    table = decoder.ropes.get("default")
    if table is None:
        raise ZooError(f"the rotary tables are {sorted(decoder.ropes)}; this format needs one, named default")
    parameters = rope_parameters(table, attention.head_dim)
    return {
        **config,
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.q_bias,
        **delta_hybrid.linear_fields(linear),
        **({} if dense is None else {"intermediate_size": dense.intermediate_size}),
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
        "rope_parameters": parameters,
        "partial_rotary_factor": parameters["partial_rotary_factor"],
    }


def expert_fields(decoder: DecoderConfig) -> dict[str, Any]:
    """The way back from `expert_args`; nothing for a decoder without experts."""
    moe = part_of(decoder, "channels", "moe")
    if moe is None:
        return {}
    return {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "shared_expert_intermediate_size": moe.shared_size,
        "norm_topk_prob": moe.normalise,
    }
