"""Which parameters train, at which rate, and with which weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from zoo.conversion.core.lora import is_adapter, plain_name
from zoo.conversion.core.stages import Stage

BETAS = (0.9, 0.95)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], new: Iterable[str], stage: Stage, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW by rate and decay; what the stage does not train is frozen.

    Norms, biases and decay parameters get no weight decay. Each group carries its highest rate as `peak`.
    """
    fresh, groups = frozenset(new), dict[tuple[float, float], list[nn.Parameter]]()
    mixers = tuple(f"model.layers.{layer}.mixer." for layer in new_layers(fresh)) if stage.mixers_alone else ("",)
    for name, parameter in named:
        rate = rate_of(name, fresh, stage) if name.startswith(mixers) else 0.0
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            decay = weight_decay if decays(name, parameter) else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": group, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), group in groups.items()
    ]


def rate_of(name: str, new: frozenset[str], stage: Stage) -> float:
    """The highest rate of a parameter; adapters train in the place of transferred parameters."""
    if is_adapter(name):
        return stage.lr_copied
    if plain_name(name) in new:
        return stage.lr_new
    return 0.0 if stage.lora else stage.lr_copied


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay makes sense for a parameter."""
    plain = not getattr(parameter, "_no_weight_decay", False) and parameter.ndim > 1
    return plain and not any("norm" in part or "bias" in part for part in name.split("."))


def make_optimizer(groups: list[dict[str, Any]], device: torch.device) -> torch.optim.AdamW:
    """AdamW; on a GPU in one fused kernel."""
    return torch.optim.AdamW(groups, betas=BETAS, eps=1e-8, fused=device.type == "cuda")


def set_rates(optimizer: Any, factor: float) -> None:
    """Every group at `factor` of its highest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def new_layers(names: Iterable[str]) -> list[int]:
    """Layers that have at least one new parameter, from names like `model.layers.3.mixer.a_proj.weight`."""
    parts = (name.split(".") for name in names)
    return sorted({int(part[2]) for part in parts if part[:2] == ["model", "layers"]})
