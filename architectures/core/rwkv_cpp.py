"""The tensor layout of rwkv.cpp, which names tensors as the RWKV project does: what the formats of all versions share.

Its `config.json` has `rwkv_version`, `vocab_size`, `hidden_size`, `num_layers`, and `num_heads` and `head_dim` from
version 5 on. Sizes that it leaves out are read off the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Embed, Layer, Norm
from zoo.architectures.core.formats import equivalent
from zoo.architectures.core.operations import Operation
from zoo.architectures.core.rules import Rule, TensorSpec, rename, through
from zoo.errors import ZooError

BLOCK, LAYER = "blocks.{i}.", "model.layers.{i}."
ATTENTION, MIXER = BLOCK + "att.", LAYER + "mixer."
FFN, CHANNEL = BLOCK + "ffn.", LAYER + "channel."
PROJECTIONS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "gate": "g_proj"}

Sizes = Mapping[str, tuple[str, int]]


def matches(config: Mapping[str, Any], version: int) -> bool:
    """Whether a `config.json` is that of this major version."""
    found = config.get("rwkv_version")
    return isinstance(found, (int, float)) and int(found) == version


def complete(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], sizes: Sizes) -> dict[str, Any]:
    """`config` with the sizes that it lacks: `sizes` names a tensor and its axis for each."""
    found = {
        name: tensors[tensor].shape[axis]
        for name, (tensor, axis) in sizes.items()
        if config.get(name) is None and tensor in tensors
    }
    return {**config, **found}


def shared_rules(gated_channel: bool = True) -> tuple[Rule, ...]:
    """Embedding, head, norms, and the matrices of the channel (with its receptance if gated)."""
    norms = {"blocks.0.ln0": "model.embed_norm", "ln_out": "model.norm"}
    norms |= {BLOCK + "ln1": LAYER + "mixer_norm", BLOCK + "ln2": LAYER + "channel_norm"}
    matrices = {"key": "up_proj", "value": "down_proj"} | ({"receptance": "gate_proj"} if gated_channel else {})
    return (
        rename("emb.weight", "model.embed_tokens.weight"),
        rename("head.weight", "lm_head.weight"),
        *(rename(f"{a}.{part}", f"{b}.{part}") for a, b in norms.items() for part in ("weight", "bias")),
        *(rename(f"{FFN}{a}.weight", f"{CHANNEL}{b}.weight") for a, b in matrices.items()),
    )


def projection_rules(*names: str) -> tuple[Rule, ...]:
    """The matrices of the mixer."""
    return tuple(rename(f"{ATTENTION}{name}.weight", f"{MIXER}{PROJECTIONS[name]}.weight") for name in names)


def per_channel(
    source: str,
    target: str,
    config: Mapping[str, Any],
    to: Sequence[str] = (),
    back: Sequence[str] = (),
    flat: bool = False,
) -> Rule:
    """One number per channel of the heads, `[H, K, 1]` in the file and `[H, K]` (or `[H K]`) in ours, through the named
    functions `to` ours and `back`."""
    heads = (config["num_heads"], config["head_dim"])
    ours, theirs = (Operation("reshape", {"shape": shape}) for shape in ((-1,) if flat else heads, (*heads, 1)))
    forward = (ours, *(Operation(name) for name in to))
    return through(ATTENTION + source, MIXER + target, forward, (*(Operation(name) for name in back), theirs))


def usual_width(hidden_size: int) -> int:
    """The width of the channel in versions 5 and 6: 3.5 times the hidden size, in steps of 32."""
    return int(hidden_size * 3.5) // 32 * 32


def layers(mixers: Sequence[Mapping[str, Any]], mixer: str, channel: Mapping[str, Any], **sizes: Any) -> DecoderConfig:
    """A decoder with one layer per mixer arguments; `sizes` are fields of the config."""
    places = [{"layer_index": index, "depth": len(mixers)} for index in range(len(mixers))]
    return DecoderConfig(
        layers=tuple(
            Layer(
                mixer=mixer,
                mixer_args={**args, **place},
                channel="rwkv_channel_mix",
                channel_args={**channel, **place},
            )
            for args, place in zip(mixers, places, strict=True)
        ),
        embed=Embed(norm=True),
        norm=Norm(kind="layer", eps=1e-5),
        **sizes,
    )


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every layout takes from a config."""
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "depth": config["num_layers"],
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config.get("context_length", 4096),
    }


def last_arguments(decoder: DecoderConfig, kind: str, mixer: str) -> tuple[Any, Any]:
    """Typed arguments of `mixer` and of RWKV's channel in the last layer (the first is special in some versions).

    Raises:
        ZooError: a last layer of other parts.
    """
    layer = decoder.layers[-1] if decoder.layers else None
    if layer is None or (layer.mixer, layer.channel) != (mixer, "rwkv_channel_mix"):
        raise ZooError(f"{kind} needs layers of {mixer} and rwkv_channel_mix; save this model as zoo")
    parts = (("mixers", mixer, layer.mixer_args), ("channels", "rwkv_channel_mix", layer.channel_args))
    mixer_args, channel_args = (registry.get(kind, name, "MODULE").parse(args) for kind, name, args in parts)
    return mixer_args, channel_args


def published(
    decoder: DecoderConfig,
    carried: Mapping[str, Any],
    version: float,
    mixer: str,
    names: Mapping[str, str],
    read: Callable[[Mapping[str, Any]], DecoderConfig],
) -> dict[str, Any]:
    """The `config.json` of `decoder`: the fields of every version, and those that `names` maps to mixer arguments.

    Raises:
        ZooError: `read` finds another decoder in it: the format cannot express this one.
    """
    mixer_args, channel_args = last_arguments(decoder, f"rwkv_version {version}", mixer)
    config = {
        **carried,
        "rwkv_version": version,
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_layers": len(decoder.layers),
        "intermediate_size": channel_args.intermediate_size,
        "context_length": decoder.max_position_embeddings,
        **{name: getattr(mixer_args, argument) for name, argument in names.items()},
    }
    if not equivalent(read(config), decoder):
        raise ZooError(f"rwkv_version {version} cannot express this model; save it as zoo")
    return config
