"""Test-time training: the dual form against autograd token by token, any split, packing, steps, bad arguments."""

from __future__ import annotations

import pytest
import torch
from ttt_calls import MINI_BATCH, TOKENS, call, cut, inputs, offsets, split_names

from zoo.kernels import dispatch
from zoo.kernels import test_time_training as ttt

BACKENDS = [name for name in dispatch.backends("test_time_training") if name not in ("reference", "triton")]
PACKED = [0, 0, 1, 5, 5, 13, 21]
KINDS = ["linear", "linear norm rows", "mlp", "mlp norm", "linear decay", "linear norm momentum", "mlp norm all"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 5, 6, 7, 14])
def test_backend_equals_the_token_loop(backend, kind, t, evaluate, assert_close):
    tensors = inputs(kind, t, with_state=False)
    expected = evaluate(call, tensors, backend="reference")
    assert_close(evaluate(call, tensors, backend=backend), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 4, 9, 14])
def test_from_the_middle_of_a_mini_batch(backend, kind, t, evaluate, assert_close):
    tensors = inputs(kind, t)
    expected = evaluate(call, tensors, offset=offsets(2), backend="reference")
    assert_close(evaluate(call, tensors, offset=offsets(2), backend=backend), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_equals_the_token_loop(backend, kind, with_state, evaluate, assert_close):
    n = len(PACKED) - 1
    tensors = inputs(kind, PACKED[-1], b=1, n=n, with_state=with_state)
    options = {"cu_seqlens": torch.tensor(PACKED, dtype=torch.int32), "offset": offsets(n)}
    expected = evaluate(call, tensors, backend="reference", **options)
    assert_close(evaluate(call, tensors, backend=backend, **options), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strength", [30.0, 1e4])
def test_strong_decay_and_momentum(backend, strength, evaluate, assert_close):
    tensors = inputs("mlp norm all", 20, strength=strength)
    expected = evaluate(call, tensors, offset=offsets(2), backend="reference")
    assert_close(evaluate(call, tensors, offset=offsets(2), backend=backend), expected, 1e-10)


def test_only_empty_sequences():
    tensors = inputs("mlp norm all", 0, b=1, n=2)
    o, *state = call(**tensors, offset=offsets(2), cu_seqlens=torch.zeros(3, dtype=torch.int32))
    before = [x for name, x in tensors.items() if name.startswith("state.")]
    assert o.shape == (1, 0, 2, 4) and all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[6], [2, 5, 6, 13], list(range(1, 20))], ids=len)
def test_any_split_gives_the_same(backend, kind, cuts):
    plain, _ = split_names(inputs(kind, 20, with_state=False))
    options = {"output_final_state": True, "backend": backend}
    o, final = ttt.test_time_training(**plain, **options)
    parts, state = [], None
    for begin, end in zip([0, *cuts], [*cuts, 20], strict=True):
        part, state = ttt.test_time_training(**cut(plain, begin, end), initial_state=state, **options)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), o, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)
    assert state["offset"].tolist() == [20 % MINI_BATCH] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_op(kind):
    plain, _ = split_names(inputs(kind, 15, with_state=False))
    o, final = ttt.test_time_training(**plain, output_final_state=True)
    has = {name: name in plain for name in ("momentum", "decay")}
    state = ttt.test_time_training_state(plain["weights"], 2, inner=plain["inner"], **has)
    found = [ttt.test_time_training_step(**cut(plain, t, t + 1), state=state) for t in range(15)]
    torch.testing.assert_close(torch.cat(found, 1), o, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


def test_bf16_sums_in_fp32(evaluate, assert_close):
    low = inputs("linear norm momentum decay", 40, dtype=torch.float32)
    low |= {name: low[name].bfloat16() for name in "qkv"}
    exact = {name: x.double() for name, x in low.items()}
    found, expected = (evaluate(call, x, offset=offsets(2)) for x in (low, exact))
    assert found["output 0"].dtype == torch.bfloat16 and found["output 1"].dtype == torch.float32
    outputs = [name for name in expected if name.startswith("output")]
    assert_close({n: found[n] for n in outputs}, {n: expected[n] for n in outputs}, 5e-3, 2e-2)
    assert_close(found, expected, 8e-3, 2e-2)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gradcheck(backend):
    tensors = {name: x.requires_grad_() for name, x in inputs("mlp norm all", 5, b=1).items()}
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *leaves: call(**dict(zip(names, leaves, strict=True)), offset=offsets(1), backend=backend),
        tuple(tensors.values()),
        fast_mode=True,
    )


# torch's own tracer instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph(evaluate, assert_close):
    tensors = inputs("linear norm all", 5, b=1, n=3, dtype=torch.float32)
    options = {"offset": offsets(3), "cu_seqlens": torch.tensor([0, 1, 1, 5], dtype=torch.int32)}
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(evaluate(compiled, tensors, **options), evaluate(call, tensors, **options), 1e-5)


BAD = [
    ({"q": torch.randn(1, 4, 4)}, "q has shape"),
    ({"lr": None}, "lr is NoneType"),
    ({"lr": torch.rand(1, 4)}, "lr has shape"),
    ({"momentum": torch.rand(1, 4, 1)}, "momentum has shape"),
    ({"decay": torch.rand(1, 4, 2).double()}, "decay has dtype torch.float64"),
    ({"weights": None}, "weights is NoneType"),
    ({"weights": {"W1": torch.zeros(2, 4, 4)}}, "weights has W1; it must have W1, b1"),
    ({"weights": {"W1": torch.zeros(2, 4, 3), "b1": torch.zeros(2, 4)}}, "weights['W1'] has shape"),
    ({"weights": {"W1": torch.zeros(2, 4, 4), "b1": torch.zeros(4)}}, "weights['b1'] has shape"),
    ({"inner": "mlp"}, "weights has W1, b1; it must have W1, b1, W2, b2"),
    ({"inner": "cubic"}, "inner is 'cubic'"),
    ({"norm_bias": None}, "norm_bias is NoneType"),
    ({"norm_weight": torch.ones(4)}, "norm_weight has shape"),
    ({"position_scale": torch.ones(5)}, "position_scale has shape"),
    ({"mini_batch": 0}, "mini_batch is 0"),
    ({"initial_state": {}}, "initial_state has nothing"),
    ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "it must run from 0 to T = 4"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_argument_is_named(change, message):
    plain, _ = split_names(inputs("linear norm", 4, b=1, dtype=torch.float32, with_state=False))
    ttt.test_time_training(**plain)
    with pytest.raises(ValueError) as caught:
        ttt.test_time_training(**plain | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_states_are_named():
    plain, _ = split_names(inputs("linear norm", 4, b=1, dtype=torch.float32, with_state=False))
    state = ttt.test_time_training_state(plain["weights"], 1)
    for name, bad in (("W1", torch.zeros(2, 2, 4, 4)), ("offset", torch.zeros(1)), ("gradient/b1", torch.zeros(1, 2))):
        with pytest.raises(ValueError, match=rf"initial_state\['{name}'\] has"):
            ttt.test_time_training(**plain, initial_state=state | {name: bad})
    with pytest.raises(ValueError, match="exactly one token"):
        ttt.test_time_training_step(**plain, state=state)
    with pytest.raises(ValueError, match="it must have W1, b1, gradient/W1, gradient/b1, momentum/W1"):
        ttt.test_time_training(**plain, momentum=-plain["lr"], initial_state=state)


def test_autocast_leaves_rates_and_states_in_fp32():
    tensors = inputs("mlp norm all", 15, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(**tensors, offset=offsets(2))
    low = {name: x.bfloat16() if name in "qkv" else x for name, x in tensors.items()}
    expected = call(**low, offset=offsets(2))
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_result_does_not_depend_on_the_batch():
    plain, _ = split_names(inputs("linear norm", 20, b=3, dtype=torch.float32, with_state=False))
    whole, _ = ttt.test_time_training(**plain)
    alone, _ = ttt.test_time_training(**{n: x[1:2] if n in TOKENS else x for n, x in plain.items()})
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-6, atol=1e-6)
