"""Checkpoint formats: who owns one, and how a checkpoint directory reads as our decoder.

The owner of a format is an architecture or a source module. It exports
`matches(config: dict) -> bool`, `decoder(config: dict) -> DecoderConfig`, `ARCHITECTURE` (the name of ours that it
reads as), `RULES` or `rules(config: dict)`, `complete(config, tensors) -> dict` where a config leaves sizes to the
shapes of the tensors, and, for saving back, `published(decoder, config: dict) -> dict`, the
published `config.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo import registry
from zoo.architectures.core.checkpoint import Checkpoint
from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.hub import one_line
from zoo.architectures.core.operations import Operation
from zoo.architectures.core.rules import Rule, Step, duplicates, steps
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.architectures.core.zoo_config import ZooConfig

# fields of a published config that say nothing about the computation and that ours has too
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


def owner(config: Mapping[str, Any]) -> ModuleType:
    """The one module that owns the format of `config` (a `config.json`).

    Raises:
        ZooError: none does (the message lists the supported model types), or more than one.
    """
    modules = [registry.load("sources", name) for name in registry.names("sources")]
    found = [module for module in modules if module.matches(config)]
    if len(found) == 1:
        return found[0]
    kind = config.get("model_type")
    if found:
        names = ", ".join(module.__name__.rpartition(".")[2] for module in found)
        raise ZooError(f"model_type {kind!r} is claimed by {names}; a format must have one owner")
    supported = ", ".join(["zoo", *registry.names("sources")])
    raise ZooError(f"model_type {kind!r} is not supported; supported are: {supported}")


def rules_of(module: ModuleType, config: Mapping[str, Any]) -> Sequence[Rule]:
    """The owner's key rules for this config."""
    rules: Sequence[Rule] = module.rules(config) if hasattr(module, "rules") else module.RULES
    return rules


@dataclass(frozen=True)
class Canonical:
    """A checkpoint directory, ours or a published one, read as our decoder.

    Args:
        checkpoint: the directory.
        config: our config of it, checked.
        format: `zoo`, or the name of the owner of the published format.
        steps: how each tensor of our decoder is made from the directory's tensors.
    """

    checkpoint: Checkpoint
    config: ZooConfig
    format: str
    steps: Mapping[str, Step]

    @cached_property
    def decoder(self) -> DecoderConfig:
        return self.config.decoder_config

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.dtype

    def get(self, name: str) -> Tensor:
        """The tensor of our decoder named `name`; memory-mapped when it is a plain copy."""
        return self.steps[name].run(self.checkpoint.get)


def read(path: Path) -> Canonical:
    """Read a checkpoint directory of any supported format; no tensor is read.

    Raises:
        ZooError: an unsupported or corrupt checkpoint, or one whose tensors are not those of its config.
    """
    checkpoint = Checkpoint(path)
    if checkpoint.config.get("model_type") == "zoo":
        return _ours(checkpoint)
    module = owner(checkpoint.config)
    name = module.__name__.rpartition(".")[2]
    try:
        published = _completed(module, checkpoint)
        decoder, rules = module.decoder(published), rules_of(module, published)
        made = steps(rules, checkpoint.tensors)
    except KeyError as error:
        raise ZooError(f"config {path / 'config.json'} lacks {error.args[0]!r}; it is not a {name} config") from None
    except ZooError as error:
        raise ZooError(f"{path}: {error}") from None
    config = zoo_config(decoder, module.ARCHITECTURE, checkpoint.config, checkpoint.dtype, name)
    check_tensors(config, {target: step.shape for target, step in made.items()}, path)
    _check_duplicates(checkpoint, rules)
    return Canonical(checkpoint, config, name, made)


def _completed(module: ModuleType, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The config, with the sizes that an owner with `complete` reads off the tensors' shapes."""
    if not hasattr(module, "complete"):
        return checkpoint.config
    completed: dict[str, Any] = module.complete(checkpoint.config, checkpoint.tensors)
    return completed


def zoo_config(
    decoder: DecoderConfig, architecture: str, published: Mapping[str, Any], dtype: torch.dtype, source: str
) -> ZooConfig:
    """Our config of a published one; `source_format` remembers the owner, for saving back."""
    from zoo.architectures.core.zoo_config import ZooConfig

    given = {**(published.get("text_config") or {}), **{k: v for k, v in published.items() if v is not None}}
    fields = {name: given[name] for name in CARRIED if given.get(name) is not None}
    return ZooConfig.from_decoder(decoder, architecture, source_format=source, dtype=dtype, **fields)


def expected_tensors(config: ZooConfig) -> dict[str, Tensor]:
    """Every parameter of the model of `config`, on the meta device; a tied one appears once, under its first name."""
    from zoo.architectures.core.modeling import model_class

    with torch.device("meta"):
        model = model_class(config)(config)
    tied = set(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def check_tensors(config: ZooConfig, shapes: Mapping[str, tuple[int, ...]], where: Path | str) -> None:
    """Raise `ZooError` naming a tensor that is missing, unexpected or of another shape than the config's model has."""
    expected = {name: tuple(tensor.shape) for name, tensor in expected_tensors(config).items()}
    for found, what in ((set(expected) - set(shapes), "is missing"), (set(shapes) - set(expected), "is unexpected")):
        if found:
            raise ZooError(f"{where}: tensor {min(found)!r} {what} ({len(found)} such); weights and config differ")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ZooError(f"{where}: tensor {name!r} has shape {shapes[name]}; the config asks for {shape}")


def _ours(checkpoint: Checkpoint) -> Canonical:
    from zoo.architectures.core.zoo_config import ZooConfig

    try:
        config = ZooConfig.from_dict(dict(checkpoint.config))
        _ = config.decoder_config
    except ZooError as error:
        raise ZooError(f"{checkpoint.path}: {error}") from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ZooError(
            f"config {checkpoint.path / 'config.json'} is corrupt ({one_line(error)}); download it again"
        ) from None
    copy = (Operation("copy"),)
    made = {name: Step(name, (name,), copy, info.shape, info.dtype) for name, info in checkpoint.tensors.items()}
    check_tensors(config, {name: step.shape for name, step in made.items()}, checkpoint.path)
    return Canonical(checkpoint, config, "zoo", made)


def equivalent(first: DecoderConfig, second: DecoderConfig) -> bool:
    """Whether two decoders compute the same, though one may spell out defaults that the other leaves out."""
    return not differences(first, second)


def differences(wanted: DecoderConfig, possible: DecoderConfig) -> list[str]:
    """What `wanted` has otherwise than `possible`, the nearest that a format can say: a phrase for each field."""
    found = [
        f"{f.name} is {mine!r}, not {theirs!r}"
        for f in fields(DecoderConfig)
        if f.name != "layers" and (mine := getattr(wanted, f.name)) != (theirs := getattr(possible, f.name))
    ]
    if len(wanted.layers) != len(possible.layers):
        return [*found, f"layers are {len(wanted.layers)}, not {len(possible.layers)}"]
    layers: dict[str, list[int]] = {}
    for index, pair in enumerate(zip(wanted.layers, possible.layers, strict=True)):
        for phrase in _layer_differences(*pair):
            layers.setdefault(phrase, []).append(index)
    return found + [f"{_named(which)} {phrase}" for phrase, which in layers.items()]


def _named(layers: Sequence[int]) -> str:
    whole = len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1
    text = f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
    return f"layer{'s' if len(layers) > 1 else ''} {text}"


def _layer_differences(wanted: Layer, possible: Layer) -> Iterator[str]:
    for kind in ("mixer", "channel", "block"):
        mine, theirs = getattr(wanted, kind), getattr(possible, kind)
        if mine != theirs:
            yield f"is {mine}, not {theirs}"
        elif mine is not None:
            parse = registry.get(f"{kind}s", mine, "MODULE").parse
            first, second = (vars(parse(getattr(layer, f"{kind}_args"))) for layer in (wanted, possible))
            found = [f"{name} {a!r}, not {second[name]!r}" for name, a in first.items() if a != second[name]]
            if found:
                yield f"({mine}) has {', '.join(found)}"
    if dict(wanted.share) != dict(possible.share):
        yield "shares weights with others"


def _check_duplicates(checkpoint: Checkpoint, rules: Sequence[Rule]) -> None:
    for name, original in duplicates(rules, checkpoint.tensors):
        if original in checkpoint.tensors and not torch.equal(checkpoint.get(name), checkpoint.get(original)):
            raise ZooError(f"{checkpoint.path}: {name!r} differs from {original!r}, to which it is tied; untie them")
