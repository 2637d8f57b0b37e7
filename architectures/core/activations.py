"""Activation functions of channels and experts, under one set of names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError


def relu2(x: Tensor) -> Tensor:
    """`max(x, 0)^2` (So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


def gelu_sigmoid(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)`, an approximation of gelu (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    return x * F.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_sigmoid": gelu_sigmoid,
    "relu2": relu2,
}


def check_activation(name: str) -> None:
    """Raise `ZooError` if no function has this name."""
    if name not in ACTIVATIONS:
        raise ZooError(f"activation was {name!r}; it must be one of {', '.join(ACTIVATIONS)}")
