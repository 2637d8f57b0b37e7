"""Which parameters train, at which rate, and how the rate goes up and down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.95)
FINAL = 0.02  # the last step's rate, as a share of the highest


@dataclass(frozen=True)
class Stage:
    """One stage of healing.

    Args:
        name: `align` or `distill`.
        steps: optimizer steps.
        rates: highest learning rate of new and of copied parameters; 0 freezes them.
        warmup: share of the steps in which the rate rises.
        hold: share of the steps after which it falls, linearly, to 2%.
    """

    name: str
    steps: int
    rates: tuple[float, float]
    warmup: float = 0.05
    hold: float = 0.2

    def factor(self, step: int) -> float:
        """The learning rate of step `step` (from 0) over its highest."""
        rise = (step + 1) / max(1.0, self.warmup * self.steps)
        fall = (self.steps - step) / max(1.0, (1 - self.hold) * self.steps)
        return min(1.0, rise, max(FINAL, fall))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], new: Iterable[str], stage: Stage, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW by rate and decay; what the stage does not train is frozen.

    Norms, biases and decay parameters get no weight decay. Each group carries its highest rate as `peak`.
    """
    fresh, groups = frozenset(new), dict[tuple[float, float], list[nn.Parameter]]()
    for name, parameter in named:
        rate = stage.rates[0] if name in fresh else stage.rates[1]
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            decay = weight_decay if decays(name, parameter) else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": group, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), group in groups.items()
    ]


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
