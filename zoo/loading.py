"""Models, tokenizers and configs by name: what `zoo.from_pretrained`, `zoo.create` and their kin do."""

from __future__ import annotations

import re
from typing import Any

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.hub import resolve
from zoo.architectures.core.load import from_pretrained, save, tokenizer
from zoo.architectures.core.modeling import ZooForCausalLM, ZooForMaskedLM, model_class
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.errors import ZooError

__all__ = ["config", "create", "from_pretrained", "resolve", "save", "tokenizer"]


def config(architecture: str, preset: str = "tiny", **overrides: Any) -> ZooConfig:
    """The config of a registered architecture.

    Args:
        architecture: its name, see `zoo.list("architectures")`.
        preset: one of its sizes.
        **overrides: arguments of its `layout` that replace the preset's.

    Raises:
        ZooError: an unknown architecture, preset or argument.
    """
    module = registry.load("architectures", architecture)
    if preset not in module.PRESETS:
        raise ZooError(
            f"architecture {architecture!r} has no preset {preset!r}; choose one of {', '.join(module.PRESETS)}"
        )
    return ZooConfig.from_decoder(_layout(module.layout, {**module.PRESETS[preset], **overrides}), architecture)


def create(architecture: str, preset: str = "tiny", **overrides: Any) -> ZooForCausalLM | ZooForMaskedLM:
    """A model with random weights (`torch.manual_seed` decides them); the arguments are those of `config`.

    An architecture that sees tokens to come gives a masked language model.
    """
    made = config(architecture, preset, **overrides)
    return model_class(made)(made).eval()


def _layout(layout: Any, arguments: dict[str, Any]) -> DecoderConfig:
    try:
        decoder: DecoderConfig = layout(**arguments)
    except TypeError as error:
        name = layout.__module__.rpartition(".")[2]
        raise ZooError(f"{re.sub(r'^[a-z]+[(][)]', name, str(error))}; see its layout()") from None
    return decoder
