"""The elementwise recurrence in Triton kernels against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from packing import packed
from vector_cases import scan_inputs as inputs

from zoo.kernels.scan import scan


@pytest.fixture
def check(check_vector):
    return partial(check_vector, scan)


@pytest.mark.slow
def test_operator_contract():
    tensors = {name: x.requires_grad_() for name, x in inputs(5, 1, n=2).items()}
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.zoo.scan, (*tensors.values(), False, cu_seqlens))
    torch.library.opcheck(torch.ops.zoo.scan, (tensors["x"], tensors["decay"], None, True, None))


@pytest.mark.parametrize(("t", "strength"), [(1, 1.0), (31, 0.0), (32, 1e4), (33, 30.0)])
def test_values_state_and_gradients(check, t, strength):
    check(inputs(t, 1, strength=strength))


def test_without_states(check):
    check(inputs(40) | {"initial_state": None}, output_final_state=False)


def test_packed_sequences(check):
    options, t, n = packed(0, 1, 37, 0, 32, 3, 0)
    check(inputs(t, 1, n=n), **options)


def test_tiles_of_channels(check):
    check(inputs(2, 1, d=34))
