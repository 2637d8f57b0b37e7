"""GPT-2 (Radford et al. 2019) as transformers publishes it: LayerNorm, GELU, biases and learned positions.

Linear layers are stored transposed, queries, keys and values as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm
from zoo.architectures.core.local_global import BIASES, arguments
from zoo.architectures.core.operations import Operation
from zoo.architectures.core.published import confirm, head_rule, part_of, require
from zoo.architectures.core.rules import Rule, alias, drop, rename, split, transpose
from zoo.errors import ZooError

ARCHITECTURE = "transformer"
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "quick_gelu": "gelu_sigmoid",
}
# one of transformers' names for each of ours
PUBLISHED_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "gelu_sigmoid": "quick_gelu"}
# transformers reads a size under either name
NAMES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
_THEIRS, _OURS = "transformer.h.{i}.", "model.layers.{i}."
_QKV = [f"{_OURS}mixer.{n}_proj." for n in "qkv"]


def _fused(theirs: str, ours: Sequence[str]) -> Rule:
    """A transposed weight `[inputs, 3 * outputs]` as three weights `[outputs, inputs]`."""
    whole = split(theirs, ours, dim=1)
    turned = tuple((*chain, Operation("transpose", {"dims": (1, 0)})) for chain in whole.forward)
    back = (Operation("concat", {"dim": 0}), Operation("transpose", {"dims": (1, 0)}))
    return replace(whole, forward=turned, backward=(back,))


RULES: tuple[Rule, ...] = (
    rename("transformer.wte.weight", "model.embed_tokens.weight"),
    rename("transformer.wpe.weight", "model.embed_positions.weight"),
    *(rename(f"transformer.ln_f.{kind}", f"model.norm.{kind}") for kind in ("weight", "bias")),
    *(rename(f"{_THEIRS}ln_1.{kind}", f"{_OURS}mixer_norm.{kind}") for kind in ("weight", "bias")),
    *(rename(f"{_THEIRS}ln_2.{kind}", f"{_OURS}channel_norm.{kind}") for kind in ("weight", "bias")),
    _fused(_THEIRS + "attn.c_attn.weight", [name + "weight" for name in _QKV]),
    split(_THEIRS + "attn.c_attn.bias", [name + "bias" for name in _QKV]),
    transpose(_THEIRS + "attn.c_proj.weight", _OURS + "mixer.o_proj.weight"),
    rename(_THEIRS + "attn.c_proj.bias", _OURS + "mixer.o_proj.bias"),
    transpose(_THEIRS + "mlp.c_fc.weight", _OURS + "channel.up_proj.weight"),
    rename(_THEIRS + "mlp.c_fc.bias", _OURS + "channel.up_proj.bias"),
    transpose(_THEIRS + "mlp.c_proj.weight", _OURS + "channel.down_proj.weight"),
    rename(_THEIRS + "mlp.c_proj.bias", _OURS + "channel.down_proj.bias"),
    *(drop(f"{_THEIRS}attn.{mask}") for mask in ("bias", "masked_bias")),
)
# what transformers takes for a field that a config leaves out
DEFAULTS: dict[str, Any] = dict(
    max_position_embeddings=1024,
    n_inner=None,
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    tie_word_embeddings=True,
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "gpt2"


def _bare(rule: Rule) -> Rule:
    """`rule` for the first checkpoints, whose names lack `transformer.`."""
    return alias(replace(rule, sources=tuple(name.removeprefix("transformer.") for name in rule.sources)))


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; the head is tied unless the config says otherwise."""
    head = head_rule(bool(config.get("tie_word_embeddings", True)), "transformer.wte.weight")
    return *RULES, *map(_bare, RULES), head


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a GPT-2 `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    config = {**DEFAULTS, **config, **{ours: config[theirs] for theirs, ours in NAMES.items() if theirs in config}}
    require(config, "activation_function", tuple(ACTIVATIONS), "gelu_new")
    require(config, "add_cross_attention", (False,), False)
    width, heads, depth = (config[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    attention = dict(heads=heads, head_dim=width // heads, **dict.fromkeys(BIASES, True))
    activation = ACTIVATIONS[config["activation_function"] or "gelu_new"]
    channel = dict(intermediate_size=config["n_inner"] or 4 * width, activation=activation)
    layers = (
        Layer(mixer="attention", mixer_args={**attention, **scale}, channel="gelu_mlp", channel_args=channel)
        for scale in (_scale(config, index, width // heads) for index in range(depth))
    )
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        layers=tuple(layers),
        embed=Embed(learned_positions=config["max_position_embeddings"]),
        head=Head(tied=bool(config["tie_word_embeddings"])),
        norm=Norm(kind="layer", eps=config["layer_norm_epsilon"]),
        max_position_embeddings=config["max_position_embeddings"],
    )


def _scale(config: Mapping[str, Any], index: int, head_dim: int) -> dict[str, float]:
    """The scale of the scores of a layer, where it is not the usual one."""
    usual = head_dim**-0.5
    scale = usual if config["scale_attn_weights"] else 1.0
    scale = scale / (index + 1) if config["scale_attn_by_inverse_layer_idx"] else scale
    return {} if scale == usual else {"scale": scale}


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The GPT-2 `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that GPT-2 cannot express.
    """
    for index, layer in enumerate(decoder.layers):
        if layer.mixer != "attention" or layer.channel != "gelu_mlp":
            raise ZooError(f"layer {index} is {layer.mixer} and {layer.channel}; gpt2 needs attention and gelu_mlp")
    channel = part_of(decoder, "channels", "gelu_mlp")
    if channel is None:
        raise ZooError("a decoder without layers has no published format")
    first, last = arguments(decoder)[0], arguments(decoder)[-1]
    result = {
        **config,
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": decoder.vocab_size,
        "n_embd": decoder.hidden_size,
        "n_layer": len(decoder.layers),
        "n_head": first.heads,
        "n_positions": decoder.max_position_embeddings,
        "n_inner": channel.intermediate_size,
        "activation_function": PUBLISHED_ACTIVATIONS[channel.activation],
        "layer_norm_epsilon": decoder.norm.eps,
        "scale_attn_weights": first.scale is None,
        "scale_attn_by_inverse_layer_idx": first.scale != last.scale,
        "tie_word_embeddings": decoder.head.tied,
    }
    return confirm(result, decoder, _decoder)
