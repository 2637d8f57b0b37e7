"""The elementwise recurrence: backends against the token loop, strong decay, packing, splits, steps.

Shapes: B batch, T tokens, N sequences, D channels.
"""

from __future__ import annotations

import pytest
import torch

from zoo.kernels import dispatch
from zoo.kernels.scan import scan, scan_step

BACKENDS = [name for name in dispatch.backends("scan") if name not in ("reference", "triton")]
PACKED = [0, 0, 1, 66, 66, 130]


def inputs(t, *, b=2, n=None, strength=1.0, dtype=torch.float64, d=3):
    return {
        "x": torch.randn(b, t, d, dtype=dtype),
        "decay": -strength * torch.rand(b, t, d, dtype=dtype) ** 2,
        "initial_state": torch.randn(n or b, d, dtype=dtype),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [1, 2, 3, 63, 64, 65, 200])
@pytest.mark.parametrize("strength", [0.0, 1.0, 30.0, 1e4])
def test_backend_equals_the_token_loop(backend, t, strength, evaluate, assert_close):
    tensors = inputs(t, strength=strength)
    expected = evaluate(scan, tensors, output_final_state=True, backend="reference")
    assert_close(evaluate(scan, tensors, output_final_state=True, backend=backend), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weak_after_total_forgetting_in_fp32(backend, evaluate, assert_close):
    tensors = inputs(200, strength=0.1)
    tensors["decay"][:, 5::17] = -1e4
    expected = evaluate(scan, tensors, output_final_state=True, backend="reference")
    single = {name: x.float() for name, x in tensors.items()}
    assert_close(evaluate(scan, single, output_final_state=True, backend=backend), expected, 1e-6, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_equals_the_token_loop_and_separate_calls(backend, with_state, evaluate, assert_close):
    tensors = inputs(PACKED[-1], b=1, n=len(PACKED) - 1)
    if not with_state:
        tensors["initial_state"] = None
    options = {"output_final_state": True, "cu_seqlens": torch.tensor(PACKED, dtype=torch.int32)}
    expected = evaluate(scan, tensors, backend="reference", **options)
    found = evaluate(scan, tensors, backend=backend, **options)
    assert_close(found, expected, 1e-12)
    for n, (begin, end) in enumerate(zip(PACKED, PACKED[1:], strict=False)):
        before = tensors["initial_state"]
        before = torch.zeros(1, 3, dtype=torch.float64) if before is None else before[n : n + 1]
        if begin == end:
            assert torch.equal(found["output 1"][n : n + 1], before)
            continue
        part = {name: tensors[name][:, begin:end] for name in ("x", "decay")}
        single, _ = scan(**part, initial_state=before, backend=backend)
        assert torch.equal(found["output 0"][:, begin:end], single)


def test_only_empty_sequences():
    tensors = inputs(0, b=1, n=2)
    h, state = scan(**tensors, output_final_state=True, cu_seqlens=torch.zeros(3, dtype=torch.int32))
    assert h.shape == (1, 0, 3) and torch.equal(state, tensors["initial_state"])


@pytest.mark.parametrize("split", [1, 47, 64])
def test_prefix_then_rest_equals_whole(split, assert_close):
    tensors = inputs(130)
    h, state = scan(**tensors, output_final_state=True)
    first, rest = ({n: tensors[n][:, part] for n in ("x", "decay")} for part in (slice(split), slice(split, None)))
    start, middle = scan(**first, initial_state=tensors["initial_state"], output_final_state=True)
    end, final = scan(**rest, initial_state=middle, output_final_state=True)
    assert_close({"h": torch.cat([start, end], 1), "state": final}, {"h": h, "state": state}, 1e-12)


def test_steps_equal_the_op(assert_close):
    tensors = inputs(9)
    h, final = scan(**tensors, output_final_state=True)
    state = tensors["initial_state"].clone()
    x, decay = tensors["x"], tensors["decay"]
    found = [scan_step(x[:, t : t + 1], decay[:, t : t + 1], state=state) for t in range(9)]
    assert_close({"h": torch.cat(found, 1), "state": state}, {"h": h, "state": final}, 1e-12)


def test_bf16_sums_in_fp32():
    low = inputs(300, strength=0.1, dtype=torch.float32)
    low["x"] = low["x"].bfloat16()
    h, state = scan(**low, output_final_state=True)
    exact, end = scan(**{name: x.double() for name, x in low.items()}, output_final_state=True)
    assert h.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (h.double() - exact).norm() <= 2.5e-3 * exact.norm() and (state - end).norm() <= 1e-6 * end.norm()


def test_rg_lru_of_transformers(assert_close):
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    x, gate = torch.randn(2, 70, 4), torch.rand(2, 70, 4)
    reset = torch.zeros(2, 70, 1, dtype=torch.bool)
    theirs, last = RecurrentGemmaRglru._rnn_scan(None, x, gate, reset, None)
    h, state = scan(x, gate.log(), output_final_state=True)
    assert_close({"h": h, "state": state}, {"h": theirs, "state": last}, 1e-6, 1e-5)


def test_gradcheck():
    tensors = {name: x.requires_grad_() for name, x in inputs(7, d=2).items()}
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *leaves: scan(**dict(zip(names, leaves, strict=True)), output_final_state=True),
        tuple(tensors.values()),
        fast_mode=True,
    )


# torch's own tracer instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph(evaluate, assert_close):
    tensors = inputs(70, b=1, n=3, dtype=torch.float32)
    options = {"cu_seqlens": torch.tensor([0, 1, 1, 70], dtype=torch.int32)}
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager", dynamic=False)
    found = evaluate(compiled, tensors, output_final_state=True, **options)
    assert_close(found, evaluate(scan, tensors, output_final_state=True, **options), 1e-6)


BAD = [
    ({"x": torch.randn(1, 4)}, "x has shape"),
    ({"x": torch.randn(1, 0, 3)}, "x has T = 0"),
    ({"x": torch.ones(1, 4, 3, dtype=torch.int32)}, "x has dtype torch.int32"),
    ({"decay": None}, "decay is NoneType"),
    ({"decay": torch.zeros(3)}, "decay has shape"),
    ({"decay": torch.zeros(1, 4, 3).double()}, "decay has dtype torch.float64"),
    ({"initial_state": torch.zeros(2, 3)}, "initial_state has shape"),
    ({"cu_seqlens": torch.tensor([0, 3, 2, 4], dtype=torch.int32)}, "must never decrease"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_argument_is_named(change, message):
    tensors = {"x": torch.randn(1, 4, 3), "decay": -torch.rand(1, 4, 3)}
    scan(**tensors)
    with pytest.raises(ValueError) as caught:
        scan(**tensors | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_step_takes_one_token_and_its_state():
    x = torch.randn(1, 2, 3)
    with pytest.raises(ValueError, match="x has T = 2; a step takes exactly one token"):
        scan_step(x, x, state=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="state has shape"):
        scan_step(x[:, :1], x[:, :1], state=torch.zeros(1, 4))
