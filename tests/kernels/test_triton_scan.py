"""The elementwise recurrence in Triton kernels against the reference, in Triton's interpreter.

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
from zoo.kernels.scan import scan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None


SHARED = ()


def inputs(t, b=2, *, n=None, strength=1.0, d=3):
    return {
        "x": torch.randn(b, t, d),
        "decay": -strength * torch.rand(b, t, d) ** 2,
        "initial_state": torch.randn(n or b, d),
    }


def call(**arguments):
    return scan(**arguments)


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
        _, state = scan(**tensors, **options, output_final_state=True, backend="triton")
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
