"""The recurrences with a matrix state and a decay: backends against the token loop, splits, packing, steps, precision.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.kernels import dispatch
from zoo.kernels.delta_rule import delta_rule, delta_rule_step
from zoo.kernels.dplr import dplr, dplr_step
from zoo.kernels.linear_attention import linear_attention, linear_attention_step

OPS = {"linear_attention": linear_attention, "delta_rule": delta_rule, "dplr": dplr}
STEPS = {"linear_attention": linear_attention_step, "delta_rule": delta_rule_step, "dplr": dplr_step}
BACKENDS = [(op, name) for op in OPS for name in dispatch.backends(op) if name not in ("reference", "triton")]
FORMS = ["none", "head", "channel", "token head", "token channel"]
PACKED = [0, 0, 1, 66, 66, 130]


def decays(form: str, shape: tuple[int, int, int, int], strength: float, dtype: torch.dtype) -> Tensor | None:
    b, t, hv, k = shape
    sizes = {"head": (hv,), "channel": (hv, k), "token head": (b, t, hv), "token channel": (b, t, hv, k)}
    return None if form == "none" else -strength * torch.rand(sizes[form], dtype=dtype) ** 2


def inputs(
    op: str,
    t: int,
    form: str = "token head",
    *,
    b: int = 2,
    n: int | None = None,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int, int, int] = (1, 2, 5, 3),
) -> dict[str, Tensor | None]:
    h, hv, k, v = sizes
    made: dict[str, Tensor | None] = {
        "q": torch.randn(b, t, h, k, dtype=dtype),
        "k": torch.nn.functional.normalize(torch.randn(b, t, h, k, dtype=dtype), dim=-1),
        "v": torch.randn(b, t, hv, v, dtype=dtype),
        "decay": decays(form, (b, t, hv, k), strength, dtype),
        "initial_state": torch.randn(n or b, hv, k, v, dtype=dtype),
    }
    if op == "delta_rule":
        made["beta"] = 2 * torch.rand(b, t, hv, dtype=dtype)
    if op == "dplr":  # as RWKV-7: what is read along a is taken away along b, no more than all of it
        made["a"] = -torch.nn.functional.normalize(torch.randn(b, t, h, k, dtype=dtype), dim=-1)
        made["b"] = -made["a"] * torch.rand(b, t, h, k, dtype=dtype)
    return made


def cut(tensors: dict[str, Tensor | None], begin: int, end: int) -> dict[str, Tensor | None]:
    """Tokens begin .. end of every tensor that has tokens."""
    t = tensors["q"].shape[1]
    return {
        name: x[:, begin:end] if x is not None and x.dim() > 2 and x.shape[1] == t and name != "initial_state" else x
        for name, x in tensors.items()
    }


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t", [1, 2, 63, 64, 65, 130])
def test_backend_equals_the_token_loop(op, backend, form, t, evaluate, assert_close):
    tensors = inputs(op, t, form)
    expected = evaluate(OPS[op], tensors, output_final_state=True, backend="reference")
    assert_close(evaluate(OPS[op], tensors, output_final_state=True, backend=backend), expected, 1e-10)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_equals_the_token_loop(op, backend, form, with_state, evaluate, assert_close):
    tensors = inputs(op, PACKED[-1], form, b=1, n=len(PACKED) - 1)
    if not with_state:
        tensors["initial_state"] = None
    options = {"output_final_state": True, "cu_seqlens": torch.tensor(PACKED, dtype=torch.int32)}
    expected = evaluate(OPS[op], tensors, backend="reference", **options)
    assert_close(evaluate(OPS[op], tensors, backend=backend, **options), expected, 1e-10)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("strength", [30.0, 1e4])
def test_strong_decay(op, backend, form, strength, evaluate, assert_close):
    tensors = inputs(op, 130, form, strength=strength)
    expected = evaluate(OPS[op], tensors, output_final_state=True, backend="reference")
    assert_close(evaluate(OPS[op], tensors, output_final_state=True, backend=backend), expected, 1e-10)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_weak_after_total_forgetting_in_fp32(op, backend, form, evaluate, assert_close):
    tensors = inputs(op, 130, form, strength=0.1)
    if form.startswith("token"):
        tensors["decay"][:, 5::17] = -1e4
    expected = evaluate(OPS[op], tensors, output_final_state=True, backend="reference")
    single = {name: x if x is None else x.float() for name, x in tensors.items()}
    assert_close(evaluate(OPS[op], single, output_final_state=True, backend=backend), expected, 1e-5, 1e-4)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.parametrize("form", ["none", "token head", "token channel"])
def test_bf16_products_stay_in_tolerance(op, backend, form, evaluate, assert_close, monkeypatch):
    if backend == "chunked":  # as on a GPU, where products round their operands to bf16
        module = f"zoo.kernels.{op}.chunked.low_precision"
        monkeypatch.setattr(module, lambda x: torch.bfloat16)
    tensors = inputs(op, 256, form, strength=0.2, sizes=(2, 2, 32, 32), dtype=torch.float32)
    tensors = {n: x.bfloat16() if n in "qkvab" else x for n, x in tensors.items()}
    exact = {n: x if x is None else x.double() for n, x in tensors.items()}
    if op == "delta_rule":
        for side in (tensors, exact):
            side["beta"] = side["beta"] / 2
    found = evaluate(OPS[op], tensors, output_final_state=True, backend=backend)
    expected = evaluate(OPS[op], exact, output_final_state=True, backend="reference")
    outputs = [name for name in expected if name.startswith("output")]
    assert_close({n: found[n] for n in outputs}, {n: expected[n] for n in outputs}, 5e-3, 2e-2)
    rest = [name for name in expected if name not in outputs]
    assert_close({n: found[n] for n in rest}, {n: expected[n] for n in rest}, 8e-3, 2e-2)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.parametrize("form", ["none", "token head", "token channel"])
def test_prefix_then_rest_equals_whole(op, backend, form, assert_close):
    tensors = inputs(op, 130, form)
    options: dict[str, Any] = {"output_final_state": True, "backend": backend}
    o, state = OPS[op](**tensors, **options)
    first, middle = OPS[op](**cut(tensors, 0, 47), **options)
    second, end = OPS[op](**cut(tensors, 47, 130) | {"initial_state": middle}, **options)
    assert_close({"o": torch.cat([first, second], 1), "state": end}, {"o": o, "state": state}, 1e-12)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_packed_equals_separate(op, backend, assert_close):
    tensors = inputs(op, PACKED[-1], b=1, n=len(PACKED) - 1)
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32)
    o, state = OPS[op](**tensors, output_final_state=True, cu_seqlens=cu_seqlens, backend=backend)
    for n, (begin, end) in enumerate(zip(PACKED, PACKED[1:], strict=False)):
        before = tensors["initial_state"][n : n + 1]
        if begin == end:
            assert torch.equal(state[n : n + 1], before)
            continue
        part = cut(tensors, begin, end) | {"initial_state": before}
        single, final = OPS[op](**part, output_final_state=True, backend=backend)
        assert_close({"o": o[:, begin:end], "state": state[n : n + 1]}, {"o": single, "state": final}, 1e-12)


@pytest.mark.parametrize("op", OPS)
def test_only_empty_sequences(op):
    tensors = inputs(op, 0, b=1, n=2)
    cu_seqlens = torch.zeros(3, dtype=torch.int32)
    o, state = OPS[op](**tensors, output_final_state=True, cu_seqlens=cu_seqlens)
    assert o.shape == (1, 0, 2, 3) and torch.equal(state, tensors["initial_state"])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", FORMS)
def test_steps_equal_the_op(op, form, assert_close):
    tensors = inputs(op, 9, form)
    o, final = OPS[op](**tensors, output_final_state=True)
    state = tensors.pop("initial_state").clone()
    found = torch.cat([STEPS[op](**cut(tensors, t, t + 1), state=state) for t in range(9)], 1)
    assert_close({"o": found, "state": state}, {"o": o, "state": final}, 1e-12)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_result_does_not_depend_on_the_batch(op, backend):
    tensors = inputs(op, 70, b=3, dtype=torch.float32)
    whole, _ = OPS[op](**tensors, backend=backend)
    again, _ = OPS[op](**tensors, backend=backend)
    row = {name: x[1:2] for name, x in tensors.items()}
    alone, _ = OPS[op](**row, backend=backend)
    assert torch.equal(whole, again)
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ["token head", "token channel"])
def test_gradcheck(op, form):
    tensors = {name: x.requires_grad_() for name, x in inputs(op, 5, form, sizes=(1, 2, 2, 2)).items()}
    names = list(tensors)

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return OPS[op](**dict(zip(names, leaves, strict=True)), output_final_state=True, backend="chunked")

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)


# torch's own tracer instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("op", OPS)
def test_compiles_in_one_graph(op, evaluate, assert_close):
    tensors = inputs(op, 70, b=1, n=3, dtype=torch.float32)
    options = {"output_final_state": True, "cu_seqlens": torch.tensor([0, 1, 1, 70], dtype=torch.int32)}
    compiled = torch.compile(OPS[op], fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(evaluate(compiled, tensors, **options), evaluate(OPS[op], tensors, **options), 1e-6)


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_gates_and_states_in_fp32(op):
    tensors = inputs(op, 70, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = OPS[op](**tensors, output_final_state=True)
    low = {n: x.bfloat16() if n in "qkvab" else x for n, x in tensors.items()}
    expected, _ = OPS[op](**low)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(o, expected)
