"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048), and its checkpoints as transformers publishes them (`rwkv`).

transformers halves the residual stream every `rescale_every` layers, and the weights that write to it, so that half
precision does not overflow; the function is the same (but for the norms' eps), so nothing is rescaled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.architectures.core import published as published_format
from zoo.architectures.core.config import DecoderConfig, Head
from zoo.architectures.core.rules import Rule, drop, rename, reshape
from zoo.architectures.core.rwkv_cpp import last_arguments, layers

ARCHITECTURE = "rwkv4"
PILE = dict(vocab_size=50277, max_position_embeddings=1024)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=3),
    "169m": dict(hidden_size=768, depth=12, **PILE),
    "430m": dict(hidden_size=1024, depth=24, **PILE),
    "1b5": dict(hidden_size=2048, depth=24, **PILE),
    "3b": dict(hidden_size=2560, depth=32, **PILE),
    "7b": dict(hidden_size=4096, depth=32, **PILE),
    "14b": dict(hidden_size=5120, depth=40, **PILE),
}
# Table 2 of arXiv 2305.13048, to the four digits printed there
PARAMETERS = {
    "169m": 169_300_000,
    "430m": 430_400_000,
    "1b5": 1_515_000_000,
    "3b": 2_985_000_000,
    "7b": 7_393_000_000,
    "14b": 14_150_000_000,
}

_NORMS = {"ln1": "mixer_norm", "ln2": "channel_norm"}
_MIXER = {"key": "k_proj", "value": "v_proj", "receptance": "r_proj", "output": "o_proj"}
_CHANNEL = {"key": "up_proj", "value": "down_proj", "receptance": "gate_proj"}
_BLOCK, _LAYER = "rwkv.blocks.{i}.", "model.layers.{i}."
_ATTENTION, _FFN = _BLOCK + "attention.", _BLOCK + "feed_forward."
RULES: tuple[Rule, ...] = (
    rename("rwkv.embeddings.weight", "model.embed_tokens.weight"),
    *(rename(f"rwkv.blocks.0.pre_ln.{w}", f"model.embed_norm.{w}") for w in ("weight", "bias")),
    *(rename(f"rwkv.ln_out.{w}", f"model.norm.{w}") for w in ("weight", "bias")),
    *(rename(f"{_BLOCK}{a}.{w}", f"{_LAYER}{b}.{w}") for a, b in _NORMS.items() for w in ("weight", "bias")),
    *(rename(f"{_ATTENTION}{a}.weight", f"{_LAYER}mixer.{b}.weight") for a, b in _MIXER.items()),
    *(rename(f"{_ATTENTION}{name}", f"{_LAYER}mixer.{name}") for name in ("time_decay", "time_first")),
    *(
        reshape(f"{_ATTENTION}time_mix_{name}", f"{_LAYER}mixer.mix_{name[0]}", to=(-1,), back=(1, 1, -1))
        for name in ("key", "value", "receptance")
    ),
    *(rename(f"{_FFN}{a}.weight", f"{_LAYER}channel.{b}.weight") for a, b in _CHANNEL.items()),
    *(
        reshape(f"{_FFN}time_mix_{name}", f"{_LAYER}channel.mix_{name[0]}", to=(-1,), back=(1, 1, -1))
        for name in ("key", "receptance")
    ),
)


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    attention_size: int | None = None,
    intermediate_size: int | None = None,
    tied: bool = False,
    max_position_embeddings: int = 1024,
) -> DecoderConfig:
    """`depth` layers; the channel is four times as wide unless `intermediate_size` is given."""
    channel = {"intermediate_size": intermediate_size or 4 * hidden_size}
    return layers(
        [{"attention_size": attention_size or hidden_size}] * depth,
        mixer="rwkv4",
        channel=channel,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        head=Head(tied=tied),
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "rwkv"


def rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The key rules; a tied checkpoint may hold its embedding a second time, as the head."""
    if config.get("tie_word_embeddings", False):
        return (*RULES, drop("head.weight", same_as="rwkv.embeddings.weight"))
    return (*RULES, rename("head.weight", "lm_head.weight"))


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a published `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    published_format.require(config, "layer_norm_epsilon", (1e-5,), 1e-5)  # that of the final norm, whatever it says
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=config["num_hidden_layers"],
        attention_size=config.get("attention_hidden_size"),
        intermediate_size=config.get("intermediate_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("context_length", 1024),
    )


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of `decoder`; `config` holds the fields to carry over.

    Raises:
        ZooError: a decoder that the format cannot express.
    """
    mixer, channel = last_arguments(decoder, "rwkv", "rwkv4")
    result = {
        **config,
        "model_type": "rwkv",
        "architectures": ["RwkvForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "attention_hidden_size": mixer.attention_size,
        "intermediate_size": channel.intermediate_size,
        "layer_norm_epsilon": decoder.norm.eps,
        "context_length": decoder.max_position_embeddings,
        "rescale_every": 0,
        "tie_word_embeddings": decoder.head.tied,
    }
    return published_format.confirm(result, decoder, _decoder)


_decoder = decoder  # `published` has an argument of that name
