"""Which training-free method each layer of a model attends by: a user's `attention=...`, parsed and checked.

A method is named by its mixer (`quest`), by a calibration file (`minference.json`), or as a method that chooses in
prefill and one that chooses in decode (`xattention+quest`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.softmax import SoftmaxArgs
from zoo.architectures.core.sparse import PHASES, Method, View
from zoo.errors import ZooError

Rule = Callable[[View], Tensor]
COMMON = {option.name for option in fields(SoftmaxArgs)}


@cache
def names() -> tuple[str, ...]:
    """The mixers that are training-free methods."""
    return tuple(name for name in registry.names("mixers") if _method(name) is not None)


def _method(name: str) -> Any:
    return getattr(registry.get("mixers", name, "MODULE"), "method", None)


def mixer_of(name: str) -> Any:
    """The mixer class of a training-free method.

    Raises:
        ZooError: no mixer has that name, or it needs training.
    """
    if name not in registry.names("mixers"):
        raise registry.unknown("mixers", name)
    if _method(name) is None:
        raise ZooError(
            f"mixer {name!r} is no training-free method: it needs training, so make a checkpoint of it with "
            f"zoo.convert; methods without training are {', '.join(names())}"
        )
    return registry.get("mixers", name, "MODULE")


def options_of(name: str) -> tuple[str, ...]:
    """The options of a method, beside those of queries, keys and values."""
    return tuple(option.name for option in fields(mixer_of(name).options) if option.name not in COMMON)


@dataclass(frozen=True)
class Part:
    """A method with its options for all layers and, from a calibration file, for each layer (None: dense)."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[Mapping[str, Any] | None] | None = None
    own: Mapping[str, Any] = field(default_factory=dict)  # the user's, over those of a file

    def __post_init__(self) -> None:
        known = options_of(self.name)
        for args in (self.args, self.own, *(layer for layer in self.layers or () if layer)):
            if not isinstance(args, Mapping):
                raise ZooError(f"the options of method {self.name!r} were {args!r}; they must be names and values")
            if unknown := sorted(set(args) - set(known)):
                raise ZooError(f"method {self.name!r} has no option {unknown[0]!r}; it takes {', '.join(known)}")

    def options(self, layer: int) -> dict[str, Any] | None:
        """The options in one layer; None where it stays dense."""
        found: Mapping[str, Any] | None = {} if self.layers is None else self.layers[layer]
        return None if found is None else {**self.args, **found, **self.own}


class Phases:
    """A method for prefill and one for decode; None is dense attention."""

    def __init__(self, prefill: Method | None, decode: Method | None) -> None:
        self.rules = {"prefill": prefill, "decode": decode}

    def __call__(self, view: View) -> Tensor:
        answer: Tensor | None = None
        for phase, rule in self.rules.items():
            if rule is None:
                continue
            notes = None if view.notes is None else view.notes.setdefault(phase, {})
            own = replace(view, notes=notes)
            if (phase == "decode") == view.decoding:
                answer = rule(own)
            else:
                rule.observe(own)
        return view.dense() if answer is None else answer


@dataclass(frozen=True)
class Choice:
    """The methods of a model: one, or one for prefill and one for decode; `dense` layers have none."""

    parts: tuple[Part, ...]
    dense: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, attention: str | Path, args: Mapping[str, Any] | None = None, dense: Sequence[int] = ()) -> Choice:
        """The choice that `attention`, `attention_args` and `dense_layers` of `from_pretrained` make.

        Raises:
            ZooError: an unknown method, one that needs training or does not choose in its phase, or wrong options.
        """
        text = str(attention)
        names = [text] if text.endswith(".json") and Path(text).is_file() else text.split("+")
        if len(names) > 2:
            raise ZooError(f"attention was {text!r}; it must be one method, or one for prefill + one for decode")
        found = [_read(name.strip()) for name in names]
        given = _by_method([part.name for part in found], args or {})
        parts = tuple(replace(part, own=own) for part, own in zip(found, given, strict=True))
        for part, phase in zip(parts, PHASES if len(parts) == 2 else (), strict=False):
            if phase not in (phases := mixer_of(part.name).method.phases):
                chooses = " and ".join(phases)
                raise ZooError(
                    f"attention was {text!r}; {part.name!r} would choose keys in {phase}, and does so in {chooses} "
                    "alone (the method for prefill comes first)"
                )
        return cls(parts, frozenset(dense))

    @property
    def mixer(self) -> str:
        return "+".join(part.name for part in self.parts)

    def key(self) -> str:
        """Text that differs where choices differ."""
        parts = [(part.name, dict(part.args), part.layers, dict(part.own)) for part in self.parts]
        return json.dumps([parts, sorted(self.dense)], sort_keys=True, default=repr)

    def check(self, depth: int, sizes: Mapping[str, Any] | None = None) -> None:
        """Raise `ZooError` where the choice does not fit a model of `depth` layers, or an option is wrong."""
        if wrong := [layer for layer in self.dense if not (isinstance(layer, int) and 0 <= layer < depth)]:
            raise ZooError(f"dense_layers has {wrong[0]!r}; layers are 0 to {depth - 1}")
        for part in self.parts:
            if part.layers is not None and len(part.layers) != depth:
                raise ZooError(
                    f"the calibration of {part.name!r} has {len(part.layers)} layers, the model {depth}; "
                    "calibrate this model with zoo calibrate"
                )
        for layer in range(depth) if sizes is not None else ():
            self.rule(layer, sizes or {})

    def args(self, part: Part, layer: int, sizes: Mapping[str, Any]) -> Any:
        """The typed options of a part in a layer of these sizes (heads, head_dim, ...); None where it is dense."""
        options = None if layer in self.dense else part.options(layer)
        if options is None:
            return None
        try:
            made = mixer_of(part.name).parse({**sizes, **options})
            made.check_method()
        except ZooError as error:
            raise ZooError(f"method {part.name!r}: {error}") from None
        return made

    def rule(self, layer: int, sizes: Mapping[str, Any]) -> Rule | None:
        """What attends in a layer; None where it stays dense."""
        made = [self.args(part, layer, sizes) for part in self.parts]
        rules = [
            None if args is None else mixer_of(part.name).method(args)
            for part, args in zip(self.parts, made, strict=True)
        ]
        if len(rules) == 1 or rules == [None, None]:
            return rules[0]
        return Phases(*rules)

    def swapped(self, decoder: DecoderConfig) -> DecoderConfig:
        """`decoder` with the methods' mixers in place of its plain `attention` layers.

        Raises:
            ZooError: it has none, or the choice does not fit it.
        """
        self.check(len(decoder.layers))
        layers = [self._swapped(index, layer) for index, layer in enumerate(decoder.layers)]
        if all(new is old for new, old in zip(layers, decoder.layers, strict=True)):
            raise ZooError(f"no layer has plain attention that {self.mixer!r} could take the place of")
        return replace(decoder, layers=tuple(layers))

    def _swapped(self, index: int, layer: Layer) -> Layer:
        options = [None if index in self.dense else part.options(index) for part in self.parts]
        if layer.mixer != "attention" or options in ([None], [None, None]):
            return layer
        if not plain(layer.mixer_args):
            return layer
        shared = {name: value for name, value in layer.mixer_args.items() if name in COMMON}
        if len(options) == 1:
            return replace(layer, mixer=self.parts[0].name, mixer_args={**shared, **(options[0] or {})})
        phases = {
            phase: None if args is None else {"mixer": part.name, **args}
            for phase, part, args in zip(PHASES, self.parts, options, strict=True)
        }
        return replace(layer, mixer="two_phase", mixer_args={**shared, **phases})


def plain(args: Mapping[str, Any]) -> bool:
    """Whether the arguments of an `attention` layer are those of full softmax attention and no more."""
    return args.get("softcap") is None and not any(value for name, value in args.items() if name not in COMMON)


def _by_method(names: Sequence[str], args: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """`attention_args` for each method; of two methods by their names."""
    if len(names) == 1:
        return [args]
    if unknown := sorted(set(args) - set(names)):
        raise ZooError(
            f"attention_args has {unknown[0]!r}; with two methods it is a mapping of "
            f"{' and '.join(map(repr, names))} to the options of each"
        )
    return [args.get(name, {}) for name in names]


def _read(name: str) -> Part:
    """A method by its name, or by the calibration file that `zoo calibrate` wrote."""
    if not name.endswith(".json"):
        return Part(name)
    try:
        data = json.loads(Path(name).read_text(encoding="utf-8"))
        method, layers, args = data["method"], data["layers"], data.get("args", {})
    except OSError:
        raise ZooError(f"no calibration file at {name}; zoo calibrate writes one") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ZooError(f"{name} is no calibration file; it needs a method and its layers") from None
    if not isinstance(layers, list):
        raise ZooError(f"{name}: layers was {layers!r}; it must be a list with the options of each layer")
    return Part(method, args, layers)
