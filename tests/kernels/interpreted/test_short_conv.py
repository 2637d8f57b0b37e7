"""Short convolutions in Triton kernels against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from packing import packed
from vector_cases import short_conv_inputs as inputs

from zoo.kernels.short_conv import short_conv


@pytest.fixture
def check(check_vector):
    return partial(check_vector, short_conv)


@pytest.mark.slow
def test_operator_contract():
    tensors = {name: x.requires_grad_() for name, x in inputs(5, 1, n=2).items()}
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.zoo.short_conv, (*tensors.values(), True, cu_seqlens))
    torch.library.opcheck(torch.ops.zoo.short_conv, (tensors["x"], tensors["weight"], None, None, False, None))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("t", [1, 3, 70])
def test_values_state_and_gradients(check, activation, t):
    check(inputs(t), activation=activation)


@pytest.mark.parametrize("width", [1, 3, 9])
def test_widths(check, width):
    check(inputs(20, width=width), activation="silu")


@pytest.mark.parametrize("activation", [None, "silu"])
def test_packed_sequences(check, activation):
    options, t, n = packed(0, 1, 67, 0, 2, 5, 0)
    check(inputs(t, 1, n=n), activation=activation, **options)


def test_without_bias_and_states(check):
    tensors = inputs(20)
    check({name: tensors[name] for name in ("x", "weight")}, output_final_state=False)
