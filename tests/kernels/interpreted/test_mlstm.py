"""The matrix LSTM on Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from zoo.kernels.mlstm import mlstm


def inputs(b, t, hv, k, v, spread=1.0, n=None):
    tensors = {name: torch.randn(b, t, 1, k) for name in ("q", "k")} | {"v": torch.randn(b, t, hv, v)}
    tensors |= {"input_gate": spread * torch.randn(b, t, hv), "forget_gate": spread * torch.randn(b, t, hv) + 2}
    return tensors | {"c": torch.randn(n or b, hv, k, v), "n": torch.randn(n or b, hv, k), "m": torch.randn(n or b, hv)}


def flat(q, k, v, input_gate, forget_gate, c=None, n=None, m=None, **options):
    """The op with its state in parts."""
    state = None if c is None else (c, n, m)
    h, state = mlstm(q, k, v, input_gate, forget_gate, initial_state=state, output_final_state=True, **options)
    return (h, *state)


@pytest.fixture
def check(evaluate, assert_close):
    def run(tensors, rms=2e-5, **options):
        exact = {name: x.double() for name, x in tensors.items()}
        expected = evaluate(flat, exact, backend="reference", **options)
        assert_close(evaluate(flat, tensors, backend="triton", **options), expected, rms)

    return run


@pytest.mark.parametrize("t", [1, 31, 70])
def test_values_states_and_gradients(check, t, monkeypatch):
    monkeypatch.setattr("zoo.kernels.linear_attention.triton.segment_size", lambda *_: 64)
    check(inputs(1, t, 2, 8, 12))


def test_without_initial_state(check):
    check({name: x for name, x in inputs(2, 9, 1, 8, 8).items() if name not in ("c", "n", "m")})


def test_packed_sequences(check):
    ends = torch.tensor([0, 0, 1, 38, 38, 43, 43], dtype=torch.int32)
    check(inputs(1, 43, 1, 8, 8, n=6), cu_seqlens=ends)


def test_packed_without_tokens():
    tensors = inputs(1, 0, 1, 8, 8, n=2)
    _, *state = flat(**tensors, cu_seqlens=torch.zeros(3, dtype=torch.int32), backend="triton")
    for have, want in zip(state, (tensors["c"], tensors["n"], tensors["m"]), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("spread", [8.0, 40.0])
def test_extreme_gates(check, spread):
    check(inputs(1, 40, 1, 8, 8, spread), rms=1e-4)


def test_minus_infinity_writes_nothing(check):
    tensors = inputs(1, 20, 1, 8, 8)
    tensors["input_gate"][:, 5:9] = -torch.inf
    check(tensors)


def test_compiles_as_one_graph(evaluate, assert_close):
    tensors = inputs(1, 20, 1, 8, 8)
    compiled = torch.compile(flat, fullgraph=True, backend="aot_eager")
    expected = evaluate(flat, tensors, backend="triton")
    assert_close(evaluate(compiled, tensors, backend="triton"), expected, 1e-6)
