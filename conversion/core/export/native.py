"""Which of transformers' own classes hold a model exactly, and what keeps the others from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from zoo import registry
from zoo.architectures.core import formats
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.formats import Canonical
from zoo.architectures.core.rules import inverse, steps
from zoo.architectures.core.shards import Spec
from zoo.conversion.core.export.rewrites import Rewrite, Weights, around_one, biased, gated, said, scaled
from zoo.errors import ZooError


@dataclass(frozen=True)
class Recipe:
    """A format that models converted here may fit: its `mixers`, and what is rewritten for it."""

    mixers: frozenset[str]
    rewrites: tuple[Rewrite, ...]


SOFTMAX = frozenset({"attention"})
# by the owner of the format, in the order in which they are tried
RECIPES = {
    "ministral": Recipe(SOFTMAX, (said,)),
    "cwm": Recipe(SOFTMAX, (said,)),
    "smollm3": Recipe(SOFTMAX, (said, biased)),
    "qwen3_5": Recipe(SOFTMAX | {"gated_delta_net"}, (said, around_one, gated)),
    "granite_hybrid": Recipe(SOFTMAX | {"mamba2"}, (said, biased, scaled)),
    "bamba": Recipe(SOFTMAX | {"mamba2"}, (said, biased)),
}


@dataclass(frozen=True)
class Exported:
    """A model as a class of transformers has it: `config.json`, and its tensors, each made when it is written."""

    config: Mapping[str, Any]
    specs: Mapping[str, Spec]
    get: Callable[[str], Tensor]


def fit(source: Canonical, to: str) -> Exported:
    """`source` for the class `to`: `native`, the first that fits, or one of transformers' classes or model types.

    Raises:
        ZooError: no class, or not that one, computes the same; the message says by layer and field why.
    """
    refused = []
    for name in _candidates(source) if to == "native" else [_owner(to)]:
        try:
            made = _fit(source, name)
        except ZooError as error:
            refused.append(f"{name}: {str(error).partition('; save')[0]}")
            continue
        if to not in ("native", name, made.config["model_type"], *made.config["architectures"]):
            raise ZooError(f"to was {to!r}, but this model is a {made.config['architectures'][0]}")
        return made
    if to == "native" and not _recipes(source.decoder):
        first = {layer.mixer: index for index, layer in reversed(list(enumerate(source.decoder.layers)))}
        refused.append("no class has " + " beside ".join(f"{mixer} (layer {i})" for mixer, i in first.items()))
    raise ZooError(f"no class of transformers holds this model ({'; '.join(refused)}); export it to remote-code")


def _candidates(source: Canonical) -> list[str]:
    """Owners of formats: that which the model came from, then those whose recipes have all its mixers."""
    came_from = getattr(source.config, "source_format", None)
    return list(dict.fromkeys([*filter(None, [came_from]), *_recipes(source.decoder)]))


def _recipes(decoder: DecoderConfig) -> list[str]:
    return [name for name, recipe in RECIPES.items() if {layer.mixer for layer in decoder.layers} <= recipe.mixers]


def _owner(to: str) -> str:
    """The owner of the format that a class or a model type of transformers, or one of our names, stands for."""
    if to in registry.names("sources"):
        return to
    classes = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(name, str)}
    kind = classes.get(to, to)
    if kind not in CONFIG_MAPPING_NAMES:
        raise ZooError(f"to was {to!r}; it must be native, remote-code, or a class or model type of transformers")
    try:
        return formats.owner({"model_type": kind}).__name__.rpartition(".")[2]
    except ZooError as error:
        raise ZooError(f"to was {to!r}: {error}") from None


def _fit(source: Canonical, name: str) -> Exported:
    module = registry.load("sources", name)
    if not hasattr(module, "published"):
        raise ZooError("we read this format and do not write it")
    recipe = RECIPES.get(name)
    came_from = name == getattr(source.config, "source_format", None)
    weights = Weights.of(source)
    if recipe is not None and not came_from:
        _check_mixers(source.decoder, name, recipe)
        for rewrite in recipe.rewrites:
            weights = rewrite(weights)
    return _publish(source, weights, module)


def _check_mixers(decoder: DecoderConfig, name: str, recipe: Recipe) -> None:
    for index, layer in enumerate(decoder.layers):
        if layer.mixer not in recipe.mixers:
            raise ZooError(f"layer {index} is {layer.mixer}; {name} has {' and '.join(sorted(recipe.mixers))}")


def _publish(source: Canonical, weights: Weights, module: ModuleType) -> Exported:
    carried = {field: getattr(source.config, field, None) for field in formats.CARRIED}
    given = {field: value for field, value in carried.items() if value is not None}
    dtype = str(source.dtype).removeprefix("torch.")
    config = module.published(weights.decoder, {**given, "dtype": dtype})
    if config["model_type"] not in CONFIG_MAPPING_NAMES:
        raise ZooError(f"{config['model_type']} is no model type of transformers")
    made = steps(inverse(formats.rules_of(module, config)), weights.specs)
    specs = {target: Spec(step.shape, step.dtype) for target, step in made.items()}
    return Exported(config, specs, lambda target: made[target].run(lambda name: weights.make[name]()))
