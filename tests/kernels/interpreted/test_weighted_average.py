"""Exponentially weighted averages in Triton kernels against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from packing import packed
from vector_cases import AVERAGES
from vector_cases import call_weighted_average as call
from vector_cases import weighted_average_inputs as inputs


@pytest.fixture
def check(check_vector):
    return partial(check_vector, call)


def test_compiles_as_one_graph(evaluate, assert_close):
    tensors, options = inputs(3, decay="none"), {"backend": "triton", "output_final_state": False}
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(evaluate(compiled, tensors, **options), evaluate(call, tensors, **options), 1e-6)


@pytest.mark.parametrize("decay", ["none", "channel", "token"])
@pytest.mark.parametrize("bonus", [False, True])
def test_values_states_and_gradients(check, decay, bonus):
    check(inputs(18, 1, decay=decay, bonus=bonus))


@pytest.mark.parametrize("t", [1, 32])
def test_lengths_around_a_tile(check, t):
    check(inputs(t, 1))


@pytest.mark.parametrize("bonus", [False, True])
def test_packed_sequences(check, bonus):
    options, t, n = packed(0, 1, 17, 0, 16, 0)
    check(inputs(t, 1, n=n, bonus=bonus), **options)


@pytest.mark.parametrize("strength", [30.0, 1e4])
def test_wide_keys_and_strong_decay(check, strength):
    check(inputs(20, 1, strength=strength, spread=30.0), rms=2e-5)


@pytest.mark.parametrize("bonus", [False, True])
def test_absent_and_equal_keys(check, bonus):
    tensors = inputs(20, bonus=bonus, decay="none", d=1)
    tensors["k"][:, 8] = tensors["k"][:, 15] = 5.0
    tensors["k"][:, :7] = tensors["k"][:, 12] = -torch.inf
    check(tensors)
    tensors["k"][0] = -torch.inf
    check({name: x for name, x in tensors.items() if name not in AVERAGES}, output_final_state=False)


def test_without_states(check):
    check({name: x for name, x in inputs(20).items() if name not in AVERAGES}, output_final_state=False)
