"""Kimi Linear (Kimi Team 2025, arXiv 2510.26692): three Kimi Delta Attention layers, then one of latent attention.

Nothing has positions but the recurrence. Channels are a mixture of experts with a shared one, but SwiGLU in the first
layers. The format is that of transformers' `kimi_linear`, and of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core import delta_hybrid
from zoo.architectures.core.config import DecoderConfig, Layer, Norm
from zoo.architectures.core.operations import Operation
from zoo.architectures.core.published import confirm, expert_rules, linear_rules, part_of, require
from zoo.architectures.core.rules import Rule, alias, depthwise, rename
from zoo.errors import ZooError

ARCHITECTURE = "kimi_linear"
ROUTER: dict[str, Any] = dict(router="sigmoid", correction_bias=True, normalise_eps=1e-20)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=4,
        latent=dict(heads=4, nope_dim=16, rope_dim=8, value_dim=16, kv_rank=32),
        linear=dict(heads=4, head_dim=16),
        intermediate_size=128,
        experts=dict(experts=4, top_k=3, intermediate_size=32, shared_size=32, normalise=True, scale=1.5, **ROUTER),
    ),
    "48b_a3b": dict(
        vocab_size=163840,
        hidden_size=2304,
        depth=27,
        latent=dict(heads=32, nope_dim=128, rope_dim=64, value_dim=128, kv_rank=512),
        linear=dict(heads=32, head_dim=128),
        intermediate_size=9216,
        experts=dict(
            experts=256, top_k=8, intermediate_size=1024, shared_size=1024, normalise=True, scale=2.446, **ROUTER
        ),
        attention_layers=(3, 7, 11, 15, 19, 23, 26),
    ),
}
PARAMETERS = {"48b_a3b": 49_122_675_072}  # transformers' class of the published config
# our name of a field: the published one
NAMES = {
    "experts": ("num_experts", "num_local_experts", 256),
    "top_k": ("num_experts_per_token", "num_experts_per_tok", 8),
    "normalise": ("moe_renormalize", "norm_topk_prob", True),
    "groups": ("num_expert_group", "n_group", 1),
    "shared": ("num_shared_experts", "n_shared_experts", 1),
    "length": ("model_max_length", "max_position_embeddings", 1048576),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    latent: Mapping[str, Any],
    linear: Mapping[str, Any],
    intermediate_size: int,
    experts: Mapping[str, Any],
    dense_layers: Sequence[int] = (0,),
    attention_layers: Sequence[int] | None = None,
    norm_eps: float = 1e-5,
    max_position_embeddings: int = 1048576,
) -> DecoderConfig:
    """`depth` layers of `kimi_delta` with arguments `linear`, but `mla` with arguments `latent` in every fourth one, or
    those at the indices `attention_layers`; channels are `moe` with arguments `experts`, `swiglu` in `dense_layers`."""
    chosen = range(3, depth, 4) if attention_layers is None else attention_layers
    mixers = {True: ("mla", latent), False: ("kimi_delta", {**linear, "norm_eps": norm_eps})}
    channels = {True: ("swiglu", {"intermediate_size": intermediate_size}), False: ("moe", experts)}

    def layer(index: int) -> Layer:
        (mixer, mixer_args), (channel, channel_args) = mixers[index in chosen], channels[index in dense_layers]
        return Layer(mixer=mixer, mixer_args=mixer_args, channel=channel, channel_args=channel_args)

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(i) for i in range(depth)),
        norm=Norm(eps=norm_eps),
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "kimi_linear"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; a layer has one kind of mixer, so that the names of both kinds never meet."""
    layer = "model.layers.{i}."
    attention, mixer, moe = layer + "self_attn.", layer + "mixer.", layer + "block_sparse_moe."
    dense = ("gate_proj", "up_proj", "down_proj")
    latent = {"q_a_proj": "q_down", "q_b_proj": "q_up", "kv_a_proj_with_mqa": "kv_down", "kv_b_proj": "kv_up"}
    delta = {"f_a_proj": "decay_down", "f_b_proj": "decay_up", "g_a_proj": "gate_down", "g_b_proj": "gate_up"}
    same = ("q_proj", "k_proj", "v_proj", "b_proj", "o_proj")
    return (
        rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
        rename("model.norm.weight", "model.norm.weight"),
        rename("lm_head.weight", "lm_head.weight"),
        rename(layer + "input_layernorm.weight", layer + "mixer_norm.weight"),
        rename(layer + "post_attention_layernorm.weight", layer + "channel_norm.weight"),
        *linear_rules(attention, mixer, same),
        *(
            rename(f"{attention}{theirs}.{kind}", f"{mixer}{ours}.{kind}")
            for theirs, ours in {**latent, **delta}.items()
            for kind in ("weight", "bias")
        ),
        *(rename(f"{attention}{x}_a_layernorm.weight", f"{mixer}{x}_norm.weight") for x in ("q", "kv")),
        *(depthwise(f"{attention}{x}_conv1d.weight", [f"{mixer}convs.{x}"]) for x in ("q", "k", "v")),
        rename(attention + "dt_bias", mixer + "dt_bias"),
        rename(attention + "o_norm.weight", mixer + "o_norm"),
        rates(attention + "A_log", mixer + "A_log"),
        *linear_rules(layer + "mlp.", layer + "channel.", dense),
        *map(alias, linear_rules(moe, layer + "channel.", dense)),  # as transformers saves layers without experts
        rename(moe + "gate.weight", layer + "channel.router.weight"),
        rename(moe + "gate.e_score_correction_bias", layer + "channel.correction_bias"),
        *linear_rules(moe + "shared_experts.", layer + "channel.shared.", dense),
        *expert_rules(moe + "experts.", layer + "channel.", named(config, "experts"), ("w1", "w3", "w2")),
    )


def rates(source: str, target: str) -> Rule:
    """`[1, 1, H, 1]` to `[H]`."""
    turned, first = Operation("transpose", {"dims": (0, 1, 3, 2)}), Operation("take", {"index": 0})
    back = Operation("stack")
    return Rule((source,), (target,), ((turned, first, first, first),), ((back, back, back, turned),))


def named(config: Mapping[str, Any], field: str) -> Any:
    """A field that published configs call by one name and transformers' code by another."""
    *names, default = NAMES[field]
    return next((config[name] for name in names if config.get(name) is not None), default)


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Kimi Linear `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    heads, depth = config["num_attention_heads"], config["num_hidden_layers"]
    require(config, "hidden_act", ("silu", "swish"), "silu")
    require(config, "mla_use_nope", (True,), True)
    require(config, "moe_router_activation_func", ("sigmoid",), "sigmoid")
    require(config, "moe_layer_freq", (1,), 1)
    require(config, "tie_word_embeddings", (False,), False)  # transformers has two tensors in either case
    require(config, "num_nextn_predict_layers", (0,), 0)
    require(config, "num_key_value_heads", (heads,), heads)
    channels = config.get("mlp_layer_types") or [
        "dense" if i < config.get("first_k_dense_replace", 1) else "sparse" for i in range(depth)
    ]
    kinds = delta_hybrid.layer_types(config, default_types(config))
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=depth,
        latent=read_latent(config),
        linear=read_linear(config),
        intermediate_size=config["intermediate_size"],
        experts=read_experts(config),
        dense_layers=[i for i, kind in enumerate(channels) if kind == "dense"],
        attention_layers=[i for i, kind in enumerate(kinds) if kind == delta_hybrid.SOFTMAX],
        norm_eps=config.get("rms_norm_eps", 1e-5),
        max_position_embeddings=named(config, "length"),
    )


def default_types(config: Mapping[str, Any]) -> list[str]:
    """The kinds that `linear_attn_config` tells (it counts from 1), or transformers' default."""
    depth, nested = config["num_hidden_layers"], config.get("linear_attn_config") or {}
    softmax = nested.get("full_attn_layers", range(5, depth + 1, 4))
    return [delta_hybrid.SOFTMAX if i + 1 in softmax else delta_hybrid.LINEAR for i in range(depth)]


def read_latent(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `mla`."""
    return {
        "heads": config["num_attention_heads"],
        "nope_dim": config.get("qk_nope_head_dim", 128),
        "rope_dim": config.get("qk_rope_head_dim", 64),
        "value_dim": config.get("v_head_dim", 128),
        "kv_rank": config.get("kv_lora_rank", 512),
        "q_rank": config.get("q_lora_rank"),
        "bias": bool(config.get("attention_bias", False)),
    }


def read_linear(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `kimi_delta`, from `linear_attn_config` or fields of their own."""
    nested = config.get("linear_attn_config") or {}
    return {
        "heads": nested.get("num_heads", config.get("linear_num_heads", 32)),
        "head_dim": nested.get("head_dim", config.get("linear_head_dim", 128)),
        "conv": nested.get("short_conv_kernel_size", config.get("linear_conv_kernel_dim", 4)),
    }


def read_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `moe`."""
    inner = config.get("moe_intermediate_size", 1024)
    return {
        "experts": named(config, "experts"),
        "top_k": named(config, "top_k"),
        "intermediate_size": inner,
        "shared_size": inner * named(config, "shared"),
        "groups": named(config, "groups"),
        "top_groups": config.get("topk_group") or 1,
        "normalise": bool(named(config, "normalise")),
        "scale": config.get("routed_scaling_factor", 2.446),
        **ROUTER,
    }


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Kimi Linear `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Kimi Linear cannot express.
    """
    kinds = delta_hybrid.types_of(decoder, "kimi_delta", "mla")
    linear, moe = part_of(decoder, "mixers", "kimi_delta"), part_of(decoder, "channels", "moe")
    latent, dense = part_of(decoder, "mixers", "mla"), part_of(decoder, "channels", "swiglu")
    if linear is None or moe is None or not moe.shared_size or moe.shared_size % moe.intermediate_size:
        raise ZooError(
            "Kimi Linear needs layers of kimi_delta, and experts with shared ones of the same size; save as zoo"
        )
    result = {
        **config,
        "model_type": "kimi_linear",
        "architectures": ["KimiLinearForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "mlp_layer_types": ["dense" if layer.channel == "swiglu" else "sparse" for layer in decoder.layers],
        "num_attention_heads": latent.heads,
        "num_key_value_heads": latent.heads,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.q_rank,
        "attention_bias": latent.bias,
        "linear_num_heads": linear.heads,
        "linear_head_dim": linear.head_dim,
        "linear_conv_kernel_dim": linear.conv,
        "intermediate_size": dense.intermediate_size if dense else moe.intermediate_size,
        "num_experts": moe.experts,
        "num_experts_per_token": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "num_shared_experts": moe.shared_size // moe.intermediate_size,
        "num_expert_group": moe.groups,
        "topk_group": moe.top_groups,
        "moe_renormalize": moe.normalise,
        "routed_scaling_factor": moe.scale,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm.eps,
        "model_max_length": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
    }
    return confirm(result, decoder, _decoder)
