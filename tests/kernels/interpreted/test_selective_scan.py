"""Diagonal state spaces in Triton kernels against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from packing import packed
from vector_cases import call_selective_scan as call
from vector_cases import selective_scan_inputs as inputs


@pytest.fixture
def check(check_vector):
    return partial(check_vector, call)


@pytest.mark.slow
def test_operator_contract():
    tensors = {name: x.requires_grad_() for name, x in inputs(5, 1, n=2).items()}
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.zoo.selective_scan, (*tensors.values(), True, cu_seqlens))


@pytest.mark.parametrize("kind", ["mamba", "groups", "s4d", "longhorn"])
def test_values_state_and_gradients(check, kind):
    check(inputs(9, 1, kind, d=4))


@pytest.mark.parametrize("t", [1, 8])
def test_lengths_around_a_tile(check, t):
    check(inputs(t, 1, d=1, states=3))


def test_groups_in_one_projection_and_odd_channels(check):
    tensors = inputs(3, 1, "groups", d=4)
    check(tensors | {"C": torch.randn(1, 3, 2)})
    check(inputs(2, 1, d=3))


@pytest.mark.parametrize("strength", [30.0, 1e4])
def test_strong_decay(check, strength):
    check(inputs(9, 1, strength=strength))


@pytest.mark.parametrize("kind", ["mamba", "s4d", "longhorn"])
def test_packed_sequences(check, kind):
    options, t, n = packed(0, 1, 9, 0, 8, 0)
    check(inputs(t, 1, kind, n=n), **options)


def test_without_states_and_skip(check):
    tensors = inputs(11)
    check({name: tensors[name] for name in ("x", "dt", "A", "B", "C")}, output_final_state=False)


def test_complex_states_run_elsewhere():
    tensors = inputs(3)
    tensors |= {"A": torch.complex(tensors["A"], tensors["A"]), "initial_state": None}
    with pytest.raises(ValueError, match="complex states"):
        call(**tensors, backend="triton")
    call(**tensors)
