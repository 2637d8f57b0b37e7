"""Short convolution: backends against the token loop, torch's convolution, splits, packing, steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels import dispatch
from zoo.kernels.short_conv import short_conv, short_conv_step

BACKENDS = [name for name in dispatch.backends("short_conv") if name not in ("reference", "triton")]


def inputs(t, width=4, *, b=2, n=None, with_state=True, dtype=torch.float64):
    return {
        "x": torch.randn(b, t, 5, dtype=dtype),
        "weight": torch.randn(5, width, dtype=dtype),
        "bias": torch.randn(5, dtype=dtype),
        "initial_state": torch.randn(n or b, 5, width, dtype=dtype) if with_state else None,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [1, 2, 3, 65])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("with_state", [True, False])
def test_backend_equals_the_token_loop(backend, t, width, with_state, evaluate, assert_close):
    tensors, options = inputs(t, width, with_state=with_state), {"activation": "silu", "output_final_state": True}
    expected = evaluate(short_conv, tensors, backend="reference", **options)
    assert_close(evaluate(short_conv, tensors, backend=backend, **options), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ends", [[0, 0, 1, 3, 3, 20], [0, 20], [0, 0, 0]])
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_equals_the_token_loop(backend, ends, with_state, evaluate, assert_close):
    tensors = inputs(ends[-1], b=1, n=len(ends) - 1, with_state=with_state)
    options = {"output_final_state": True, "cu_seqlens": torch.tensor(ends, dtype=torch.int32)}
    expected = evaluate(short_conv, tensors, backend="reference", **options)
    assert_close(evaluate(short_conv, tensors, backend=backend, **options), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_depthwise_convolution(backend):
    tensors = inputs(30, with_state=False)
    y, state = short_conv(**tensors, backend=backend, output_final_state=True)
    padded = F.pad(tensors["x"].mT, [3, 0])
    expected = F.conv1d(padded, tensors["weight"][:, None], tensors["bias"], groups=5)
    torch.testing.assert_close(y, expected.mT)
    assert torch.equal(state, tensors["x"][:, -4:].mT)


@pytest.mark.parametrize("split", [1, 3, 17])
def test_prefix_then_rest_equals_whole(split):
    tensors = inputs(20)
    y, state = short_conv(**tensors, output_final_state=True)
    first, middle = short_conv(**tensors | {"x": tensors["x"][:, :split]}, output_final_state=True)
    rest = tensors | {"x": tensors["x"][:, split:], "initial_state": middle}
    second, end = short_conv(**rest, output_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    assert torch.equal(end, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_equal_the_op(dtype):
    tensors = inputs(9, dtype=dtype)
    y, final = short_conv(**tensors, activation="silu", output_final_state=True)
    state = tensors.pop("initial_state").clone()
    x = tensors.pop("x")
    found = [short_conv_step(x[:, t : t + 1], **tensors, state=state, activation="silu") for t in range(9)]
    torch.testing.assert_close(torch.cat(found, 1), y)
    assert torch.equal(state, final)


def test_bf16_sums_in_fp32():
    low = {name: x.bfloat16() for name, x in inputs(40, dtype=torch.float32).items()}
    y, _ = short_conv(**low)
    exact, _ = short_conv(**{name: x.double() for name, x in low.items()})
    assert torch.equal(y, exact.bfloat16()) or (y.double() - exact).norm() <= 2.5e-3 * exact.norm()


def test_compiles_in_one_graph(evaluate, assert_close):
    tensors = inputs(20, b=1, n=2, dtype=torch.float32)
    options = {"cu_seqlens": torch.tensor([0, 2, 20], dtype=torch.int32)}
    compiled = torch.compile(short_conv, fullgraph=True, backend="aot_eager", dynamic=False)
    found = evaluate(compiled, tensors, output_final_state=True, **options)
    assert_close(found, evaluate(short_conv, tensors, output_final_state=True, **options), 1e-6)


def test_gradcheck():
    tensors = {name: x.requires_grad_() for name, x in inputs(4).items()}
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *leaves: short_conv(**dict(zip(names, leaves, strict=True)), activation="silu")[0],
        tuple(tensors.values()),
        fast_mode=True,
    )
