"""Exponentially weighted averages in Triton kernels against the reference, in Triton's interpreter.

The interpreter has to be chosen before triton is imported, so this file runs itself in a process of its own; there it
holds the tests proper. Without triton, all there is to test is that the backend says so.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from zoo.kernels import vector
from zoo.kernels.weighted_average import weighted_average

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None


SHARED = ("bonus",)
STATE = ("numerator", "denominator", "maximum")


def inputs(t, b=2, *, n=None, decay="token", bonus=True, strength=1.0, spread=1.0, d=2):
    shapes = {"none": None, "channel": (d,), "token": (b, t, d)}
    tensors = {
        "k": spread * torch.randn(b, t, d),
        "v": torch.randn(b, t, d),
        "decay": None if decay == "none" else -strength * torch.rand(shapes[decay]),
        "bonus": torch.randn(d) if bonus else None,
        "numerator": torch.randn(n or b, d),
        "denominator": torch.rand(n or b, d),
        "maximum": torch.randn(n or b, d),
    }
    return {name: x for name, x in tensors.items() if x is not None}


def call(numerator=None, denominator=None, maximum=None, **arguments):
    begin = None if numerator is None else (numerator, denominator, maximum)
    o, state = weighted_average(**arguments, initial_state=begin)
    return (o, *(state or ()))


if INSTALLED and not INTERPRETED:

    @pytest.mark.timeout(900)
    def test_kernels_in_the_interpreter(root):
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_cpu_is_refused():
        with pytest.raises(ValueError, match="CUDA device"):
            call(**inputs(3), backend="triton")


if not INSTALLED:

    def test_backend_says_that_triton_is_missing():
        with pytest.raises(ValueError, match="triton is not installed"):
            call(**inputs(3), backend="triton")


if INSTALLED and INTERPRETED:

    @pytest.fixture
    def check(evaluate, assert_close):
        def run(tensors, rms=1e-5, **options):
            exact = {name: None if x is None else x.double() for name, x in tensors.items()}
            options = {"output_final_state": True} | options
            expected = evaluate(call, exact, backend="reference", **options)
            assert_close(evaluate(call, tensors, backend="triton", **options), expected, rms)

        return run

    def packed(*lengths):
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return {"cu_seqlens": ends}, int(ends[-1]), len(lengths)

    def test_fp64_is_refused():
        with pytest.raises(ValueError, match="fp64"):
            call(**{name: x if x is None else x.double() for name, x in inputs(3).items()}, backend="triton")

    def test_packed_without_tokens():
        options, t, n = packed(0, 0)
        tensors = inputs(t, 1, n=n)
        _, state = weighted_average(
            **{name: x for name, x in tensors.items() if name not in STATE},
            initial_state=tuple(tensors[name] for name in STATE),
            **options,
            output_final_state=True,
            backend="triton",
        )
        for found, given in zip(state, (tensors[name] for name in STATE), strict=True):
            assert torch.equal(found, given)

    @pytest.mark.parametrize(("dtype", "rms"), [(torch.float16, 2e-3), (torch.bfloat16, 8e-3)])
    def test_half_precision_inputs(evaluate, assert_close, dtype, rms):
        tensors = {name: x.to(dtype) if name in ("k", "v") else x for name, x in inputs(9).items()}
        exact = {name: x.double() for name, x in tensors.items()}
        found = evaluate(call, tensors, output_final_state=True, backend="triton")
        assert found["output 0"].dtype == dtype
        assert_close(found, evaluate(call, exact, output_final_state=True, backend="reference"), rms)

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
        check({name: x for name, x in tensors.items() if name not in STATE}, output_final_state=False)

    def test_without_states(check):
        check({name: x for name, x in inputs(20).items() if name not in STATE}, output_final_state=False)

    def test_segments_equal_one_pass(check, monkeypatch):
        monkeypatch.setattr(vector, "SEGMENT", 16)
        check(inputs(35, 1, d=1))
        options, t, n = packed(0, 1, 20, 0)
        check(inputs(t, 1, n=n, d=1), **options)

    def test_batch_does_not_matter(monkeypatch):
        monkeypatch.setattr(vector, "SEGMENT", 16)
        tensors = inputs(33, d=1)
        together = call(**tensors, backend="triton")[0]
        parts = [{name: x if name in SHARED else x[i : i + 1] for name, x in tensors.items()} for i in range(2)]
        assert torch.equal(together, torch.cat([call(**part, backend="triton")[0] for part in parts]))
