"""Short convolutions in Triton kernels against the reference, in Triton's interpreter.

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

from zoo.kernels.short_conv import short_conv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None


def inputs(t, b=2, *, n=None, d=3, width=4):
    return {
        "x": torch.randn(b, t, d),
        "weight": torch.randn(d, width),
        "bias": torch.randn(d),
        "initial_state": torch.randn(n or b, d, width),
    }


def call(**arguments):
    return short_conv(**arguments)


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
        _, state = short_conv(**tensors, **options, output_final_state=True, backend="triton")
        for found, given in zip((state,), (tensors["initial_state"],), strict=True):
            assert torch.equal(found, given)

    @pytest.mark.parametrize(("dtype", "rms"), [(torch.float16, 2e-3), (torch.bfloat16, 8e-3)])
    def test_half_precision_inputs(evaluate, assert_close, dtype, rms):
        tensors = {name: x.to(dtype) if name in ("x",) else x for name, x in inputs(9).items()}
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
