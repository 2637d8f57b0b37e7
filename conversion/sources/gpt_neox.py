"""GPT-NeoX and Pythia (Black et al. 2022, arXiv 2204.06745; Biderman et al. 2023, arXiv 2304.01373) as transformers
publishes them: LayerNorm, GELU and biases, attention and MLP side by side or in turn, rotation of a share of each head.

Queries, keys and values are stored as one, head by head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.local_global import BIASES
from zoo.architectures.core.published import confirm, head_rule, part_of, require, rope, rope_parameters
from zoo.architectures.core.rules import Rule, alias, drop, rename, unweave
from zoo.conversion.sources.gpt2 import ACTIVATIONS, PUBLISHED_ACTIVATIONS
from zoo.errors import ZooError

ARCHITECTURE = "transformer"
_THEIRS, _OURS = "gpt_neox.layers.{i}.", "model.layers.{i}."
_RENAMED = {
    "gpt_neox.final_layer_norm.": "model.norm.",
    _THEIRS + "input_layernorm.": _OURS + "mixer_norm.",
    _THEIRS + "post_attention_layernorm.": _OURS + "channel_norm.",
    _THEIRS + "attention.dense.": _OURS + "mixer.o_proj.",
    _THEIRS + "mlp.dense_h_to_4h.": _OURS + "channel.up_proj.",
    _THEIRS + "mlp.dense_4h_to_h.": _OURS + "channel.down_proj.",
}
RULES: tuple[Rule, ...] = (
    rename("gpt_neox.embed_in.weight", "model.embed_tokens.weight"),
    *(rename(theirs + kind, ours + kind) for theirs, ours in _RENAMED.items() for kind in ("weight", "bias")),
    *(drop(f"{_THEIRS}attention.{buffer}") for buffer in ("bias", "masked_bias", "rotary_emb.inv_freq")),
)
# what transformers takes for a field that a config leaves out
DEFAULTS: dict[str, Any] = dict(
    hidden_act="gelu",
    attention_bias=True,
    use_parallel_residual=True,
    layer_norm_eps=1e-5,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    rotary_pct=0.25,
    rotary_emb_base=10000.0,
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "gpt_neox"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; each head's rows of the fused projection are its query, its key and its value."""
    heads = config["num_attention_heads"]
    sizes = [config["hidden_size"] // heads] * 3
    fused = (
        unweave(
            f"{_THEIRS}attention.query_key_value.{kind}", [f"{_OURS}mixer.{n}_proj.{kind}" for n in "qkv"], sizes, heads
        )
        for kind in ("weight", "bias")
    )
    tied = bool(config.get("tie_word_embeddings", False))
    head = [head_rule(tied, "gpt_neox.embed_in.weight", name) for name in ("embed_out.weight", "lm_head.weight")]
    return *RULES, *fused, head[0], alias(head[1])


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a GPT-NeoX `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    config = {**DEFAULTS, **config}
    require(config, "hidden_act", tuple(ACTIVATIONS), "gelu")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = width // heads
    require(config, "head_dim", (head_dim,), head_dim)
    attention = dict(heads=heads, head_dim=head_dim, rope="default")
    attention |= dict.fromkeys(BIASES, bool(config["attention_bias"]))
    activation = ACTIVATIONS[config["hidden_act"] or "gelu"]
    layer = Layer(
        mixer="attention",
        mixer_args=attention,
        channel="gelu_mlp",
        channel_args=dict(intermediate_size=config["intermediate_size"], activation=activation),
        block="parallel" if config["use_parallel_residual"] else "pre_norm",
        block_args={"norms": 2} if config["use_parallel_residual"] else {},
    )
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        layers=(layer,) * config["num_hidden_layers"],
        head=Head(tied=bool(config["tie_word_embeddings"])),
        norm=Norm(kind="layer", eps=config["layer_norm_eps"]),
        ropes={"default": _rope(config, head_dim)},
        max_position_embeddings=config["max_position_embeddings"],
    )


def _rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary table; the usual names of its fields are not this format's, and transformers passes over them."""
    for usual, name in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        require(config, usual, (config[name],), config[name])
    given = {
        "rope_theta": config["rotary_emb_base"],
        **(config.get("rope_scaling") or config.get("rope_parameters") or {}),
    }
    sizes = {name: config[name] for name in ("model_type", "max_position_embeddings") if name in config}
    return rope({**sizes, "rope_parameters": given}, head_dim, partial=config["rotary_pct"])


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The GPT-NeoX `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that GPT-NeoX cannot express.
    """
    for index, layer in enumerate(decoder.layers):
        if layer.mixer != "attention" or layer.channel != "gelu_mlp":
            raise ZooError(f"layer {index} is {layer.mixer} and {layer.channel}; gpt_neox needs attention and gelu_mlp")
    attention, channel = part_of(decoder, "mixers", "attention"), part_of(decoder, "channels", "gelu_mlp")
    if attention is None or "default" not in decoder.ropes:
        raise ZooError("gpt_neox needs layers, and a rotary table named default; save as zoo")
    result = {
        **config,
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": attention.heads,
        "intermediate_size": channel.intermediate_size,
        "hidden_act": PUBLISHED_ACTIVATIONS[channel.activation],
        "attention_bias": attention.q_bias,
        "use_parallel_residual": decoder.layers[0].block == "parallel",
        "layer_norm_eps": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
        "rope_parameters": rope_parameters(decoder.ropes["default"], attention.head_dim),
    }
    return confirm(result, decoder, _decoder)
