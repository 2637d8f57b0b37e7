"""Diagonal state spaces in Triton kernels against the reference, in Triton's interpreter.

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
from zoo.kernels.selective_scan import selective_scan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None


SHARED = ("A", "D")


def inputs(t, b=2, kind="mamba", *, n=None, strength=1.0, d=2, states=2):
    shape = {"groups": (b, t, 2, states), "s4d": (d, states)}.get(kind, (b, t, states))
    tensors = {
        "x": torch.randn(b, t, d),
        "dt": torch.rand(b, t, d) / (states if kind == "longhorn" else 1),
        "A": None if kind == "longhorn" else -strength * torch.rand(d, states),
        "B": torch.rand(shape),
        "C": torch.randn(shape),
        "D": torch.randn(d),
        "initial_state": torch.randn(n or b, d, states),
    }
    return {name: x for name, x in tensors.items() if x is not None}


def call(A=None, D=None, initial_state=None, **arguments):
    kind = "longhorn" if A is None else "mamba"
    return selective_scan(A=A, D=D, initial_state=initial_state, transition=kind, **arguments)


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
        _, state = selective_scan(**tensors, **options, output_final_state=True, backend="triton")
        for found, given in zip((state,), (tensors["initial_state"],), strict=True):
            assert torch.equal(found, given)

    @pytest.mark.parametrize(("dtype", "rms"), [(torch.float16, 2e-3), (torch.bfloat16, 8e-3)])
    def test_half_precision_inputs(evaluate, assert_close, dtype, rms):
        tensors = {name: x.to(dtype) if name in ("x", "B", "C") else x for name, x in inputs(9).items()}
        exact = {name: x.double() for name, x in tensors.items()}
        found = evaluate(call, tensors, output_final_state=True, backend="triton")
        assert found["output 0"].dtype == dtype
        assert_close(found, evaluate(call, exact, output_final_state=True, backend="reference"), rms)

    def test_compiles_as_one_graph(evaluate, assert_close):
        tensors, options = inputs(3), {"backend": "triton", "output_final_state": True}
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert_close(evaluate(compiled, tensors, **options), evaluate(call, tensors, **options), 1e-6)

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
