"""Zamba2 (Glorioso et al. 2024, arXiv 2411.15242): Mamba-2 with one or two transformer blocks shared between depths.

Every sixth layer or so, a shared block of attention and MLP reads the residual stream beside the embeddings; its output
is projected and added to what that layer's Mamba-2 sees. Uses of one block share all but their low-rank adapters and
their projection. The format is that of transformers' `zamba2`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zoo.architectures.channels.zamba2 import PROJECTIONS, SHARED
from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.mamba_rules import mamba2_rules, time_step_limit
from zoo.architectures.core.published import confirm, head_rule, part_of, require, rope_parameters
from zoo.architectures.core.published import rope as read_rope
from zoo.architectures.core.rules import Rule, drop, rename
from zoo.errors import ZooError

ARCHITECTURE = "zamba2"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=5,
        hybrid_layers=(1, 2, 3),
        blocks=2,
        heads=4,
        intermediate_size=96,
        adapter_rank=4,
        adapt_attention=True,
        rope=Rope(dim=32),
        mamba=dict(heads=4, head_dim=32, state_dim=16),
    ),
    "1.2b": dict(
        vocab_size=32000,
        hidden_size=2048,
        depth=38,
        hybrid_layers=(5, 11, 17, 23, 29, 35),
        heads=32,
        intermediate_size=8192,
        adapt_attention=True,
        rope=Rope(dim=128),
        mamba=dict(heads=64, head_dim=64, state_dim=128),
        max_position_embeddings=4096,
    ),
    "2.7b": dict(
        vocab_size=32000,
        hidden_size=2560,
        depth=54,
        hybrid_layers=(6, 12, 18, 24, 30, 36, 42, 47, 51),
        blocks=2,
        heads=32,
        intermediate_size=10240,
        mamba=dict(heads=80, head_dim=64, state_dim=64),
        max_position_embeddings=4096,
    ),
    "7b": dict(
        vocab_size=32000,
        hidden_size=3584,
        depth=81,
        hybrid_layers=(6, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77),
        blocks=2,
        heads=32,
        intermediate_size=14336,
        rope=Rope(dim=224),
        mamba=dict(heads=112, head_dim=64, state_dim=64, groups=2),
        max_position_embeddings=4096,
    ),
}
# computed from the published configs; the report says 1.2B, 2.7B and 7.4B
PARAMETERS = {"1.2b": 1_215_064_704, "2.7b": 2_662_214_560, "7b": 7_356_749_648}
DEFAULT_HYBRID = (6, 12, 18, 24, 30, 36, 42, 47, 51)  # where a config names no layers
GATED_NORM_EPS = 1e-5  # of Mamba-2's output norm, whatever the others have


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    hybrid_layers: Sequence[int],
    heads: int,
    intermediate_size: int,
    mamba: Mapping[str, Any],
    blocks: int = 1,
    kv_heads: int | None = None,
    adapter_rank: int = 128,
    adapt_attention: bool = False,
    bias: bool = False,
    rope: Rope | None = None,
    time_step_min: float = 0.001,
    norm_eps: float = 1e-5,
    max_position_embeddings: int = 4096,
) -> DecoderConfig:
    """`depth` layers of `mamba2` with arguments `mamba`; `hybrid_layers` use `blocks` shared transformers in turn.

    `rope` is the shared attention's table, over heads of `2 hidden_size / heads` channels (None: no positions).
    """
    limit = (time_step_min, None) if time_step_min > 0 else None
    given = {"norm_groups": mamba.get("groups", 1), "norm_eps": GATED_NORM_EPS, "time_step_limit": limit, **mamba}
    channel = {
        "heads": heads,
        "head_dim": 2 * hidden_size // heads,
        "kv_heads": kv_heads or heads,
        "intermediate_size": intermediate_size,
        "adapter_rank": adapter_rank,
        "adapt_attention": adapt_attention,
        "rope": None if rope is None else "default",
        "bias": bias,
    }

    def layer(index: int) -> Layer:
        if index not in hybrid_layers:
            return Layer(mixer="mamba2", mixer_args=given)
        block = list(hybrid_layers).index(index) % blocks
        share = {f"channel.{name}": f"{block}.{name}" for name in SHARED}
        return Layer(
            mixer="mamba2", mixer_args=given, channel="zamba2", channel_args=channel, block="zamba2", share=share
        )

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(i) for i in range(depth)),
        head=Head(tied=True),
        norm=Norm(eps=norm_eps),
        ropes={} if rope is None else {"default": rope},
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "zamba2"


# ours: theirs, inside a shared transformer
_SHARED = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "pre_ff_layernorm.weight",
    **{f"attention.{name}.base.weight": f"self_attn.{name}.weight" for name in PROJECTIONS},
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    **{f"gate_up_proj.base.{kind}": f"feed_forward.gate_up_proj.{kind}" for kind in ("weight", "bias")},
    **{f"down_proj.{kind}": f"feed_forward.down_proj.{kind}" for kind in ("weight", "bias")},
}
_ADAPTERS = {
    **{f"attention.{name}": f"self_attn.linear_{name[0]}_adapter_list" for name in PROJECTIONS},
    "gate_up_proj": "feed_forward.gate_up_proj_adapter_list",
}


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules. The first use of a block holds its shared weights and the adapters of all its uses."""
    hybrid, blocks, mamba = _hybrid_layers(config), config.get("num_mem_blocks", 1), _mamba(config)
    made = [
        rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
        rename("model.final_layernorm.weight", "model.norm.weight"),
        head_rule(tied=True),
        rename("model.layers.{i}.linear.weight", "model.layers.{i}.channel.out_proj.weight"),
    ]
    for index in range(config["num_hidden_layers"]):
        ours = f"model.layers.{index}."
        theirs = ours + ("mamba_decoder." if index in hybrid else "")
        made.append(rename(theirs + "input_layernorm.weight", ours + "mixer_norm.weight"))
        made += mamba2_rules(theirs + "mamba.", ours + "mixer.", mamba)
    for use, index in enumerate(hybrid):
        made += _use_rules(use, index, hybrid[use % blocks])
    return made


def _use_rules(use: int, index: int, first: int) -> Iterator[Rule]:
    """The rules of the shared transformer's use number `use`, in layer `index`; `first` is the block's first layer."""
    theirs, ours = f"model.layers.{first}.shared_transformer.", f"model.layers.{index}.channel."
    again = f"model.layers.{index}.shared_transformer."
    for mine, name in _SHARED.items():
        yield rename(theirs + name, ours + mine) if index == first else drop(again + name, same_as=theirs + name)
    for mine, name in _ADAPTERS.items():
        for number, part in enumerate(("down", "up")):
            yield rename(f"{theirs}{name}.{use}.{number}.weight", f"{ours}{mine}.{part}.weight")
    if index != first:
        yield drop(again + "{any}_adapter_list.{use}.{part}.weight")  # the block's adapters once more


def _hybrid_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    words = config.get("layers_block_type") or config.get("layer_types")
    if words is None:
        return DEFAULT_HYBRID
    for word in words:
        allowed = ("mamba", "linear_attention", "hybrid")
        require({"model_type": "zamba2", "layers_block_type": word}, "layers_block_type", allowed, None)
    return tuple(index for index, word in enumerate(words) if word == "hybrid")


def _mamba(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config.get("n_mamba_heads", 8)
    return {
        "heads": heads,
        "head_dim": int(config.get("mamba_expand", 2) * config["hidden_size"]) // heads,
        "state_dim": config.get("mamba_d_state", 64),
        "groups": config.get("mamba_ngroups", 1),
        "conv": config.get("mamba_d_conv", 4),
        "biases": ("z", "x", "B", "C", "dt", "out") if config.get("add_bias_linear") else (),
    }


def _check(config: Mapping[str, Any]) -> None:
    require(config, "hidden_act", ("gelu",), "gelu")
    require(config, "use_conv_bias", (True,), True)
    require(config, "use_long_context", (False,), False)
    require(config, "tie_word_embeddings", (True,), True)  # untied, transformers does not share the blocks either
    if time_step_limit(config.get("time_step_limit")) is not None:
        raise ZooError("time_step_limit of a zamba2 checkpoint is not supported; it must be (0, infinity)")


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Zamba2 `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    _check(config)
    width, heads = config["hidden_size"], config.get("num_attention_heads", 32)
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        depth=config["num_hidden_layers"],
        hybrid_layers=_hybrid_layers(config),
        blocks=config.get("num_mem_blocks", 1),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        intermediate_size=config.get("intermediate_size") or 4 * width,
        mamba=_mamba(config),
        adapter_rank=config.get("adapter_rank", 128),
        adapt_attention=bool(config.get("use_shared_attention_adapter", False)),
        bias=bool(config.get("add_bias_linear", False)),
        rope=read_rope(config, 2 * width // heads) if config.get("use_mem_rope") else None,
        # transformers takes this, the least time step of the start, as the limit at run time too
        time_step_min=config.get("time_step_min", 0.001),
        norm_eps=config.get("rms_norm_eps", 1e-5),
        max_position_embeddings=config.get("max_position_embeddings", 4096),
    )


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Zamba2 `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Zamba2 cannot express.
    """
    mamba, shared = part_of(decoder, "mixers", "mamba2"), part_of(decoder, "channels", "zamba2")
    if mamba is None or shared is None:
        raise ZooError("Zamba2 needs mamba2 in every layer, and a shared transformer in some; save as zoo")
    keys = {layer.share.get("channel.down_proj") for layer in decoder.layers if layer.channel == "zamba2"}
    limit = mamba.time_step_limit or (0.0, None)
    table = decoder.ropes.get("default")
    result = {
        **config,
        "model_type": "zamba2",
        "architectures": ["Zamba2ForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "layers_block_type": ["mamba" if layer.channel is None else "hybrid" for layer in decoder.layers],
        "num_mem_blocks": len(keys),
        "num_attention_heads": shared.heads,
        "num_key_value_heads": shared.kv_heads or shared.heads,
        "intermediate_size": shared.intermediate_size,
        "adapter_rank": shared.adapter_rank,
        "use_shared_attention_adapter": shared.adapt_attention,
        "add_bias_linear": shared.bias,
        "hidden_act": "gelu",
        "use_mem_rope": table is not None,
        "rope_parameters": rope_parameters(table or Rope(dim=2)),
        "n_mamba_heads": mamba.heads,
        "mamba_expand": mamba.heads * mamba.head_dim // decoder.hidden_size,
        "mamba_d_state": mamba.state_dim,
        "mamba_ngroups": mamba.groups,
        "mamba_d_conv": mamba.conv,
        "time_step_min": limit[0],
        "rms_norm_eps": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
    }
    return confirm(result, decoder, _decoder)
