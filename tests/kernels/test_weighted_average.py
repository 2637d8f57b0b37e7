"""Exponentially weighted averages: backends against the token loop, RWKV-4, the plain softmax; packing, splits, steps.

Shapes: B batch, T tokens, N sequences, D channels.
"""

from __future__ import annotations

import pytest
import torch

from zoo.kernels import dispatch
from zoo.kernels.weighted_average import weighted_average, weighted_average_step

BACKENDS = [name for name in dispatch.backends("weighted_average") if name not in ("reference", "triton")]
PARTS = ("numerator", "denominator", "maximum")
PACKED = [0, 0, 1, 66, 66, 130]
FORMS = [("none", False), ("channel", True), ("token", True), ("token", False)]


def inputs(t, form="channel", bonus=True, *, b=2, n=None, scale=3.0, strength=1.0, dtype=torch.float64, d=3):
    shape = {"none": None, "channel": (d,), "token": (b, t, d)}[form]
    return {
        "k": scale * torch.randn(b, t, d, dtype=dtype),
        "v": torch.randn(b, t, d, dtype=dtype),
        "decay": None if shape is None else -strength * torch.rand(shape, dtype=dtype) ** 2,
        "bonus": torch.randn(d, dtype=dtype) if bonus else None,
        "numerator": torch.randn(n or b, d, dtype=dtype),
        "denominator": torch.rand(n or b, d, dtype=dtype) + 0.5,
        "maximum": torch.randn(n or b, d, dtype=dtype),
    }


def op(k, v, decay=None, bonus=None, **options):
    """The op with the parts of its states apart."""
    parts = [options.pop(name, None) for name in PARTS]
    state = None if parts[0] is None else tuple(parts)
    o, final = weighted_average(k, v, decay, bonus, initial_state=state, output_final_state=True, **options)
    return o, *final


def cut(tensors, begin, end):
    t = tensors["k"].shape[1]
    return {
        name: x[:, begin:end] if x is not None and x.dim() == 3 and x.shape[1] == t else x
        for name, x in tensors.items()
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("form", "bonus"), FORMS)
@pytest.mark.parametrize("t", [1, 2, 63, 65, 130])
def test_backend_equals_the_token_loop(backend, form, bonus, t, evaluate, assert_close):
    tensors = inputs(t, form, bonus)
    expected = evaluate(op, tensors, backend="reference")
    assert_close(evaluate(op, tensors, backend=backend), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("form", "bonus"), FORMS)
def test_without_a_state(backend, form, bonus, evaluate, assert_close):
    tensors = {name: x for name, x in inputs(70, form, bonus).items() if name not in PARTS}
    expected = evaluate(op, tensors, backend="reference")
    assert_close(evaluate(op, tensors, backend=backend), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scale", "strength"), [(300.0, 1.0), (3.0, 1e4), (1e4, 1e4)])
def test_large_keys_and_strong_decay(backend, scale, strength, evaluate, assert_close):
    tensors = inputs(130, "token", scale=scale, strength=strength)
    expected = evaluate(op, tensors, backend="reference")
    assert all(x.isfinite().all() for x in expected.values())
    assert_close(evaluate(op, tensors, backend=backend), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("form", "bonus"), FORMS)
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_equals_the_token_loop(backend, form, bonus, with_state, evaluate, assert_close):
    tensors = inputs(PACKED[-1], form, bonus, b=1, n=len(PACKED) - 1)
    if not with_state:
        tensors = {name: x for name, x in tensors.items() if name not in PARTS}
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32)
    expected = evaluate(op, tensors, backend="reference", cu_seqlens=cu_seqlens)
    assert_close(evaluate(op, tensors, backend=backend, cu_seqlens=cu_seqlens), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate(backend):
    tensors = inputs(PACKED[-1], "token", b=1, n=len(PACKED) - 1)
    o, *state = op(**tensors, cu_seqlens=torch.tensor(PACKED, dtype=torch.int32), backend=backend)
    for n, (begin, end) in enumerate(zip(PACKED, PACKED[1:], strict=False)):
        before = {name: tensors[name][n : n + 1] for name in PARTS}
        after = [x[n : n + 1] for x in state]
        if begin == end:
            assert all(torch.equal(x, y) for x, y in zip(before.values(), after, strict=True))
            continue
        single, *final = op(**cut(tensors, begin, end) | before, backend=backend)
        torch.testing.assert_close([o[:, begin:end], *after], [single, *final], rtol=1e-12, atol=1e-12)


def test_only_empty_sequences():
    tensors = inputs(0, b=1, n=2)
    o, *state = op(**tensors, cu_seqlens=torch.zeros(3, dtype=torch.int32))
    assert o.shape == (1, 0, 3) and all(torch.equal(x, tensors[n]) for n, x in zip(PARTS, state, strict=True))


@pytest.mark.parametrize(("form", "bonus"), FORMS)
def test_prefix_then_rest_equals_whole(form, bonus):
    tensors = inputs(130, form, bonus)
    o, *state = op(**tensors)
    first, *middle = op(**cut(tensors, 0, 47))
    second, *end = op(**cut(tensors, 47, 130) | dict(zip(PARTS, middle, strict=True)))
    torch.testing.assert_close([torch.cat([first, second], 1), *end], [o, *state], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("form", "bonus"), FORMS)
def test_steps_equal_the_op(form, bonus):
    tensors = inputs(9, form, bonus)
    o, *final = op(**tensors)
    state = tuple(tensors.pop(name).clone() for name in PARTS)
    found = [weighted_average_step(**cut(tensors, t, t + 1), state=state) for t in range(9)]
    torch.testing.assert_close([torch.cat(found, 1), *state], [o, *final], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_state", [True, False])
def test_equals_rwkv_of_transformers(with_state, assert_close):
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    tensors = inputs(70, dtype=torch.float32)
    state = [tensors.pop(name) for name in PARTS]
    if with_state:
        tensors |= dict(zip(PARTS, state, strict=True))
    time_decay, bonus = tensors["decay"].neg().log(), tensors["bonus"]
    start = [x.clone() for x in state] if with_state else None
    theirs, last = rwkv_linear_attention_cpu(time_decay, bonus, tensors["k"], tensors["v"], start, return_state=True)
    found = dict(zip(("o", *PARTS), op(**tensors), strict=True))
    assert_close(found, dict(zip(("o", *PARTS), (theirs, *last), strict=True)), 1e-5, 1e-4)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_decay_it_is_a_softmax(backend):
    tensors = inputs(70, "none", False)
    o, *_ = op(tensors["k"], tensors["v"], backend=backend)
    scores = tensors["k"][:, None].expand(-1, 70, -1, -1)
    seen = torch.ones(70, 70, dtype=torch.bool).tril()[..., None]
    expected = (scores.masked_fill(~seen, -torch.inf).softmax(2) * tensors["v"][:, None]).sum(2)
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bonus", [True, False])
def test_keys_of_minus_infinity_are_left_out(backend, bonus, evaluate):
    tensors = {name: x for name, x in inputs(12, "none", bonus, b=1).items() if name not in PARTS}
    o, *state = op(**cut(tensors, 5, 12), backend=backend)
    padded = tensors | {"k": tensors["k"].clone()}
    padded["k"][:, :5] = -torch.inf
    found = evaluate(op, padded, backend=backend)
    torch.testing.assert_close([found["output 0"][:, 5:], found["output 1"]], [o, state[0]])
    assert not found["output 0"][:, :5].any()
    assert all(x.isfinite().all() for x in found.values())


def test_weak_after_total_forgetting_in_fp32(evaluate, assert_close):
    tensors = inputs(130, "token", strength=0.1)
    tensors["decay"][:, 5::17] = -1e4
    expected = evaluate(op, tensors, backend="reference")
    single = {name: x.float() for name, x in tensors.items()}
    assert_close(evaluate(op, single), expected, 1e-5, 1e-4)


def test_bf16_sums_in_fp32(evaluate, assert_close):
    low = inputs(200, scale=1.0, dtype=torch.float32)
    low |= {name: low[name].bfloat16() for name in "kv"}
    found, expected = (evaluate(op, x) for x in (low, {name: x.double() for name, x in low.items()}))
    assert found["output 0"].dtype == torch.bfloat16 and found["output 1"].dtype == torch.float32
    assert_close(found, expected, 5e-3, 2e-2)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gradcheck(backend):
    tensors = {name: x.requires_grad_() for name, x in inputs(5, "token", d=2).items()}
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *leaves: op(**dict(zip(names, leaves, strict=True)), backend=backend), tuple(tensors.values())
    )


# torch's own tracer instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph(evaluate, assert_close):
    tensors = inputs(9, b=1, n=2, dtype=torch.float32)
    options = {"cu_seqlens": torch.tensor([0, 1, 9], dtype=torch.int32)}
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(evaluate(compiled, tensors, **options), evaluate(op, tensors, **options), 1e-6)


BAD = [
    ({"k": torch.randn(1, 4)}, "k has shape"),
    ({"v": torch.randn(1, 4, 2)}, "v has shape"),
    ({"v": torch.randn(1, 4, 3).double()}, "v has dtype torch.float64"),
    ({"decay": torch.zeros(1, 4)}, "decay has shape"),
    ({"bonus": torch.zeros(2)}, "bonus has shape"),
    ({"initial_state": torch.zeros(1, 3)}, "initial_state is Tensor; it must be a tuple"),
    ({"initial_state": (torch.zeros(1, 3),) * 2 + (torch.zeros(1, 4),)}, "maximum of initial_state has shape"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_argument_is_named(change, message):
    tensors = {"k": torch.randn(1, 4, 3), "v": torch.randn(1, 4, 3)}
    weighted_average(**tensors)
    with pytest.raises(ValueError) as caught:
        weighted_average(**tensors | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
