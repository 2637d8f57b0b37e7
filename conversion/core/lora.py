"""Adapters of low rank (LoRA), by peft: added to a student for one stage, and merged into its weights after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.conversion.core.stages import Lora
from zoo.errors import ZooError


def require_peft(what: str) -> Any:
    """The module.

    Raises:
        ZooError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ZooError(f"{what} needs peft, which is not installed; pip install peft") from None
    return peft


def check_targets(model: nn.Module, lora: Lora) -> None:
    """Refuse targets of which the model has no linear layer, and any without peft."""
    require_peft("lora")
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in lora.targets:
        if target not in linear:
            known = ", ".join(sorted(linear))
            raise ZooError(f"lora target {target!r} is no linear layer of the student; it has {known}")


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Put adapters beside the linear layers; they start as zero, and the same in every run and process."""
    peft = require_peft("lora")
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, model)


def merge_adapters(model: nn.Module) -> None:
    """Plain linear layers again, with what their adapters learned."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge()
            model.set_submodule(name, layer.get_base_layer(), strict=True)


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return ".lora_" in name


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(".base_layer.", ".")
