"""Comparisons that all kernel tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # the modules of calls, which importlib mode does not find by itself
Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def _evaluate(op: Callable[..., Any], tensors: Mapping[str, Tensor | None], **options: Any) -> Results:
    """Every output of `op` and the gradient of a fixed random sum of them for every floating tensor."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items() if x is not None}
    outputs = op(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {i}": x for i, x in enumerate(outputs) if x is not None}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for x in found.values():
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (torch.where(x.isfinite(), x, 0.0).double() * weight).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {name: x.detach() for name, x in found.items()} | dict(zip(leaves, gradients, strict=True))


def _assert_close(found: Results, expected: Results, rms: float, worst: float | None = None) -> None:
    """Relative RMS and worst element, so that neither an all-zero nor one wrong element passes."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        have, want = found[name].double(), want.double()
        if not want.numel():
            continue
        finite = want.isfinite()
        assert torch.equal(have[~finite], want[~finite]), f"{name}: other infinities"
        error, want = (have - want)[finite], want[finite]
        assert error.isfinite().all(), f"{name}: not finite"
        floor = 1e-12 * want.numel() ** 0.5
        assert error.norm() <= rms * want.norm() + floor, f"{name}: {error.norm() / want.norm():.2e}"
        assert error.abs().max() <= (worst or 10 * rms) * want.abs().max() + 1e-12, f"{name}: worst element"


@pytest.fixture
def evaluate() -> Callable[..., Results]:
    return _evaluate


@pytest.fixture
def assert_close() -> Callable[..., None]:
    return _assert_close
