"""What readers of published configs share: values that must be known, rotary tables, and the check of a way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Rope
from zoo.architectures.core.formats import differences
from zoo.architectures.core.rope import TYPES, check_long_rope
from zoo.architectures.core.rules import Rule, alias, drop, rename, stack
from zoo.errors import ZooError

STRETCHED = ("llama3", "yarn", "longrope")  # rope types that know the length before stretching
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
# where multimodal checkpoints keep the names `model.` and `lm_head.` of their language model: before and since 2025
TOWERS = (("language_model.model.", "language_model."), ("model.language_model.", ""))


def require(config: Mapping[str, Any], name: str, allowed: Sequence[Any], default: Any) -> None:
    """Refuse a value of `config[name]` (None or missing: `default`) whose computation we do not have."""
    value = config.get(name)
    if (default if value is None else value) not in allowed:
        kind = config.get("model_type", "this")
        raise ZooError(f"{name} {value!r} of a {kind} checkpoint is not supported; it must be one of {allowed}")


def activation(config: Mapping[str, Any], name: str = "hidden_act", default: str = "silu") -> str:
    """Our name (`core/activations.py`) of the function that `config[name]` calls by transformers' name."""
    require(config, name, tuple(ACTIVATION_NAMES), default)
    return ACTIVATION_NAMES[config.get(name) or default]


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint's language model: the nested `text_config` of a multimodal one, else `config`.

    Token ids, dtype and quantisation come from the outer config where the nested one has none; an outer
    `tie_word_embeddings` wins, as in transformers.
    """
    if not isinstance(nested := config.get("text_config"), Mapping):
        return dict(config)
    outer = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config")
    inherited = {name: config[name] for name in outer if config.get(name) is not None and nested.get(name) is None}
    if config.get("tie_word_embeddings") is not None:
        inherited["tie_word_embeddings"] = config["tie_word_embeddings"]
    return {**nested, **inherited}


def towers(rules: Sequence[Rule], drops: Sequence[str]) -> tuple[Rule, ...]:
    """`rules` of a language model (`model.*`, `lm_head.*`) as a multimodal checkpoint names its tensors.

    They are read under both names in `TOWERS`, and never written: a language model is saved by itself. The modules
    `drops` (`vision_tower`, ...), also inside `model.`, are left out.
    """
    read = [
        alias(
            replace(rule, sources=tuple(map(rename_in, rule.sources)), same_as=rule.same_as and rename_in(rule.same_as))
        )
        for rename_in in (_prefixed(*prefixes) for prefixes in TOWERS)
        for rule in rules
    ]
    return (*read, *(drop(f"{prefix}{module}.{{any}}") for prefix in ("", "model.") for module in drops))


def _prefixed(inside: str, beside: str) -> Callable[[str], str]:
    return lambda name: inside + name.removeprefix("model.") if name.startswith("model.") else beside + name


def expert_rules(
    theirs: str, ours: str, count: int, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Rule, ...]:
    """Linear layers `{theirs}{e}.{name}.weight` of `count` experts, stacked as our `moe` channel `ours` has them.

    `names` are theirs for gate, up and down projections, or for up and down where experts have no gate.
    """
    *first, down = (f"{theirs}{{e}}.{name}.weight" for name in names)
    target = "gate_up_proj" if len(first) == 2 else "up_proj"
    return (
        stack(first if len(first) == 2 else first[0], f"{ours}experts.{target}", count),
        stack(down, f"{ours}experts.down_proj", count),
    )


def rope(config: Mapping[str, Any], head_dim: int, pairing: str = "half", partial: float = 1.0) -> Rope:
    """The rotary table of a published config, from `rope_parameters` or the older `rope_scaling` and `rope_theta`.

    `partial` is the rotated share of a head where the config names none.

    Raises:
        ZooError: a rope type that we do not have, or a longrope without its factors.
    """
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    share = given.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or partial
    require({**config, "rope_type": kind}, "rope_type", TYPES, "default")
    if kind in STRETCHED:
        name = "original_max_position_embeddings"  # outside the rope's parameters it wins, as in transformers
        inside = given.get(name) or config.get("max_position_embeddings", 2048)
        given[name] = config.get(name) or inside
    scaling = {} if kind == "default" else {"rope_type": kind, **given}
    table = Rope(dim=int(head_dim * share), theta=float(theta), scaling=scaling, pairing=pairing)
    if kind == "longrope":
        check_long_rope(table)
    return table


def rope_parameters(table: Rope, head_dim: int | None = None) -> dict[str, Any]:
    """transformers' `rope_parameters` of a rotary table; with `head_dim` the rotated share is named too."""
    share = {} if head_dim is None else {"partial_rotary_factor": table.dim / head_dim}
    return {"rope_type": "default", **table.scaling, "rope_theta": table.theta, **share}


def confirm(
    config: dict[str, Any], decoder: DecoderConfig, read: Callable[[Mapping[str, Any]], DecoderConfig]
) -> dict[str, Any]:
    """`config`, a published `config.json` made from `decoder`, once `read` finds the same decoder in it.

    Raises:
        ZooError: the format cannot express `decoder`.
    """
    if found := differences(decoder, read(config)):
        raise ZooError(f"{config['model_type']} cannot express this model: {'; '.join(found)}")
    return config


def part_of(decoder: DecoderConfig, kind: str, name: str) -> Any:
    """Typed arguments of the part `name` of `kind` (mixers, channels, blocks), the same wherever it is; None: nowhere.

    Raises:
        ZooError: layers whose arguments differ.
    """
    field = kind.removesuffix("s")
    parse = registry.get(kind, name, "MODULE").parse
    found = [parse(getattr(layer, f"{field}_args")) for layer in decoder.layers if getattr(layer, field) == name]
    if any(args != found[0] for args in found):
        raise ZooError(f"layers of {name} differ, which this format cannot express; save as zoo")
    return found[0] if found else None


def head_rule(tied: bool, embedding: str = "model.embed_tokens.weight", head: str = "lm_head.weight") -> Rule:
    """The rule for the output head; a tied checkpoint may hold its `embedding` a second time, as the `head`."""
    return drop(head, same_as=embedding) if tied else rename(head, "lm_head.weight")


def linear_rules(theirs: str, ours: str, names: Sequence[str]) -> tuple[Rule, ...]:
    """Weights and biases of linear layers that keep their `names` under another prefix."""
    return tuple(rename(f"{theirs}{n}.{kind}", f"{ours}{n}.{kind}") for n in names for kind in ("weight", "bias"))


def preimage(function: Callable[[float], float], value: float, guess: float) -> float:
    """The float next to `guess` (a few units in the last place around it) that `function` maps to exactly `value`.

    Published multipliers pass through one rounded operation on their way in; this undoes it without a rest. Where no
    such float exists the guess is returned.
    """
    candidates = [guess]
    for direction in (math.inf, -math.inf):
        step = guess
        for _ in range(4):
            step = math.nextafter(step, direction)
            candidates.append(step)
    return next((c for c in candidates if function(c) == value), guess)
