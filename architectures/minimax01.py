"""MiniMax-01 (MiniMax 2025, arXiv 2501.08313): seven layers of lightning attention, then one of softmax attention, with
a mixture of experts in each; the residual is the normed stream.

The format is transformers' `minimax`, and that of the checkpoints first published (`minimax_text_01`), whose config has
other names for the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.local_global import FULL
from zoo.architectures.core.published import (
    confirm,
    expert_rules,
    head_rule,
    part_of,
    require,
    rope,
    rope_parameters,
)
from zoo.architectures.core.rules import Rule, drop, rename, unweave
from zoo.errors import ZooError

ARCHITECTURE = "minimax01"
LINEAR = "linear_attention"
DEEPNORM = 3.5565588200778455
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=4,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        experts=4,
        top_k=2,
        softmax_every=4,
        alpha=DEEPNORM,
        max_position_embeddings=2048,
    ),
    "456b": dict(
        vocab_size=200064,
        hidden_size=6144,
        depth=80,
        heads=64,
        kv_heads=8,
        head_dim=128,
        intermediate_size=9216,
        experts=32,
        top_k=2,
        alpha=DEEPNORM,
        rope=Rope(dim=64, theta=10000000.0),
        max_position_embeddings=10240000,
    ),
}
PARAMETERS = {"456b": 456_000_000_000}  # the paper's abstract
# what transformers takes for a field that a config leaves out
DEFAULTS: dict[str, Any] = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    num_experts_per_tok=2,
    num_local_experts=8,
    rope_theta=1000000.0,
)
SCALES = tuple(f"{part}_{kind}_factor" for part in ("full_attn", "linear_attn", "mlp") for kind in ("alpha", "beta"))
OLDER = {
    f"layernorm_{old}_{kind}": f"{new}_{kind}_factor"
    for old, new in (("full_attention", "full_attn"), ("linear_attention", "linear_attn"), ("mlp", "mlp"))
    for kind in ("alpha", "beta")
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
    experts: int,
    top_k: int,
    softmax_every: int = 8,
    kinds: Sequence[str] | None = None,
    window: int | None = None,
    alpha: float = 1.0,
    scales: Mapping[str, float] | None = None,
    rope: Rope | None = None,
    norm_eps: float = 1e-5,
    tied: bool = False,
    max_position_embeddings: int = 131072,
) -> DecoderConfig:
    """`depth` layers, each `softmax_every`-th with softmax attention (over `window` keys if given), or as `kinds`
    (linear_attention, full_attention) says. `alpha` multiplies the normed stream everywhere; `scales` overrides it and
    the branches' factors of 1 by transformers' names (`full_attn_alpha_factor`, ...)."""
    kinds = kinds or [LINEAR if (index + 1) % softmax_every else FULL for index in range(depth)]
    factors = {name: alpha if "alpha" in name else 1.0 for name in SCALES} | dict(scales or {})
    softmax = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope="default", window=window)
    moe = dict(experts=experts, top_k=top_k, intermediate_size=intermediate_size, normalise=True)

    def layer(index: int) -> Layer:
        linear = kinds[index] == LINEAR
        lightning = dict(heads=heads, head_dim=head_dim, layer_index=index, depth=depth)
        part = "linear_attn" if linear else "full_attn"
        return Layer(
            mixer="lightning" if linear else "attention",
            mixer_args=lightning if linear else softmax,
            channel="moe",
            channel_args=moe,
            block="normed_residual",
            block_args={
                f"{ours}_{kind}": float(factors[f"{theirs}_{kind}_factor"])
                for ours, theirs in (("mixer", part), ("channel", "mlp"))
                for kind in ("alpha", "beta")
            },
        )

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(index) for index in range(depth)),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": rope or Rope(dim=head_dim, theta=1000000.0)},
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") in ("minimax", "minimax_text_01")


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules. Decays, which a checkpoint may hold, follow from the config."""
    config = _named(config)
    theirs, ours = "model.layers.{i}.", "model.layers.{i}."
    attention, mixer, moe = theirs + "self_attn.", ours + "mixer.", theirs + "block_sparse_moe."
    return (
        rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
        rename("model.norm.weight", "model.norm.weight"),
        head_rule(bool(config["tie_word_embeddings"])),
        rename(theirs + "input_layernorm.weight", ours + "mixer_norm.weight"),
        rename(theirs + "post_attention_layernorm.weight", ours + "channel_norm.weight"),
        *(rule for index, kind in enumerate(config["layer_types"]) for rule in _projections(index, kind, config)),
        rename(attention + "output_gate.weight", mixer + "g_proj.weight"),
        rename(attention + "norm.weight", mixer + "o_norm"),
        *(drop(attention + name) for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay")),
        rename(moe + "gate.weight", ours + "channel.router.weight"),
        *expert_rules(moe + "experts.", ours + "channel.", config["num_local_experts"], ("w1", "w3", "w2")),
    )


def _projections(index: int, kind: str, config: Mapping[str, Any]) -> Sequence[Rule]:
    """Lightning attention has the queries, keys and values of each head side by side in one projection."""
    theirs, ours = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mixer."
    if kind == FULL:
        return [rename(f"{theirs}{name}_proj.weight", f"{ours}{name}_proj.weight") for name in "qkvo"]
    sizes, targets = (config["head_dim"],) * 3, [f"{ours}{name}_proj.weight" for name in "qkv"]
    return [
        unweave(theirs + "qkv_proj.weight", targets, sizes, config["num_attention_heads"]),
        rename(theirs + "out_proj.weight", ours + "o_proj.weight"),
    ]


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a MiniMax-01 `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    config = _named(config)
    require(config, "hidden_act", ("silu", "swish"), "silu")
    require(config, "router_jitter_noise", (0.0,), 0.0)
    require(config, "shared_intermediate_size", (0,), 0)
    require(config, "postnorm", (True,), True)
    depth, kinds = config["num_hidden_layers"], config["layer_types"]
    if len(kinds) != depth or set(kinds) - {LINEAR, FULL}:
        raise ZooError(f"layer_types was {list(kinds)}; it must name {LINEAR} or {FULL} for each of {depth} layers")
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=depth,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate_size=config["intermediate_size"],
        experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        kinds=kinds,
        window=config.get("sliding_window"),
        scales={name: config[name] for name in SCALES if name in config},
        rope=rope(config, config["head_dim"], partial=config["rotary_dim"] / config["head_dim"]),
        norm_eps=config["rms_norm_eps"],
        tied=config["tie_word_embeddings"],
        max_position_embeddings=config["max_position_embeddings"],
    )


_decoder = decoder  # `published` has an argument of that name


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` by transformers' names, with its defaults."""
    named = {**DEFAULTS, **{OLDER.get(name, name): value for name, value in config.items() if value is not None}}
    named.setdefault("head_dim", named["hidden_size"] // named["num_attention_heads"])
    named.setdefault("rotary_dim", named["head_dim"])
    softmax = named.get("attn_type_list") or [int(index % 2 == 0) for index in range(named["num_hidden_layers"])]
    named.setdefault("layer_types", [FULL if each else LINEAR for each in softmax])
    return named


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The MiniMax `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    `rotary_dim` is there where a part of each head is rotated.

    Raises:
        ZooError: a decoder that MiniMax cannot express.
    """
    moe, softmax = part_of(decoder, "channels", "moe"), part_of(decoder, "mixers", "attention")
    blocks = {layer.mixer: layer.block_args for layer in decoder.layers if layer.block == "normed_residual"}
    if moe is None or set(blocks) - {"attention", "lightning"} or "default" not in decoder.ropes:
        raise ZooError("MiniMax needs lightning or attention, moe channels and normed_residual blocks; save as zoo")
    first, table = decoder.layers[0].mixer_args, decoder.ropes["default"]
    result = {
        **config,
        "model_type": "minimax",
        "architectures": ["MiniMaxForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": first["heads"],
        "num_key_value_heads": (softmax and softmax.kv_heads) or first["heads"],
        "head_dim": first["head_dim"],
        **({} if table.dim == first["head_dim"] else {"rotary_dim": table.dim}),
        "sliding_window": softmax and softmax.window,
        "layer_types": [LINEAR if layer.mixer == "lightning" else FULL for layer in decoder.layers],
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
        "rope_parameters": rope_parameters(table),
        **_scales(blocks),
    }
    return confirm(result, decoder, _decoder)


def _scales(blocks: Mapping[str | None, Mapping[str, Any]]) -> dict[str, float]:
    """transformers' factors of the residual stream and the branches, from one block of each mixer."""
    found = {}
    for mixer, args in blocks.items():
        part = "full_attn" if mixer == "attention" else "linear_attn"
        for kind in ("alpha", "beta"):
            found[f"{part}_{kind}_factor"] = args.get(f"mixer_{kind}", 1.0)
            found[f"mlp_{kind}_factor"] = args.get(f"channel_{kind}", 1.0)
    return found
