"""mLSTM and sLSTM: backends against the token loop, splits, packing, steps, extreme gates, bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from xlstm_calls import D64, INPUTS, OPS, STATES, cut, flat, mlstm_inputs, named

from zoo.kernels import dispatch
from zoo.kernels.mlstm import mlstm_step
from zoo.kernels.slstm import slstm_step

STEPS = {"mlstm": mlstm_step, "slstm": slstm_step}
BACKENDS = [(op, name) for op in OPS for name in dispatch.backends(op) if name not in ("reference", "triton")]
PACKED = [0, 0, 1, 66, 66, 130]


def assert_backend(op, backend, tensors, evaluate, assert_close, rms=1e-10, worst=None, **options):
    expected = evaluate(flat(op), tensors, backend="reference", **options)
    assert all(x.isfinite().all() for x in expected.values())
    assert_close(evaluate(flat(op), tensors, backend=backend, **options), expected, rms, worst)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.parametrize("t", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("with_state", [True, False])
def test_backend_equals_the_token_loop(op, backend, t, with_state, evaluate, assert_close):
    assert_backend(op, backend, INPUTS[op](t, with_state=with_state), evaluate, assert_close)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_equals_the_token_loop(op, backend, with_state, evaluate, assert_close):
    tensors = INPUTS[op](PACKED[-1], b=1, n=len(PACKED) - 1, with_state=with_state)
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32)
    assert_backend(op, backend, tensors, evaluate, assert_close, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.parametrize("spread", [30.0, 1e3])
def test_extreme_gates(op, backend, spread, evaluate, assert_close):
    """Input gates whose exponential overflows, forget gates that clear everything: all stays finite and equal."""
    tensors = INPUTS[op](130)
    for name in ("input_gate", "forget_gate"):
        tensors[name] = tensors[name] * spread / 2
    assert_backend(op, backend, tensors, evaluate, assert_close)
    single = {name: x.float() for name, x in tensors.items()}
    found = evaluate(flat(op), single, backend=backend)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_fp32_is_near_fp64(op, backend, evaluate, assert_close):
    tensors = INPUTS[op](130)
    expected = evaluate(flat(op), tensors, backend="reference")
    single = {name: x.float() for name, x in tensors.items()}
    assert_close(evaluate(flat(op), single, backend=backend), expected, 1e-5, 1e-4)


@pytest.mark.parametrize("op", OPS)
def test_inputs_in_bf16_are_computed_in_fp32(op, assert_close):
    tensors = INPUTS[op](100, dtype=torch.float32)
    low = ("q", "k", "v", "cell_input")
    tensors = {name: x.bfloat16() if name in low else x for name, x in tensors.items()}
    exact = {name: x.double() for name, x in tensors.items()}
    found, expected = named(op, flat(op)(**tensors)), named(op, flat(op)(**exact))
    assert found["out"].dtype == torch.bfloat16 and found["m"].dtype == torch.float32
    assert_close(found, expected, 5e-3, 2e-2)


def test_bf16_products_stay_in_tolerance(evaluate, assert_close, monkeypatch):
    """As on a GPU, where products round their operands to bf16."""
    monkeypatch.setattr("zoo.kernels.mlstm.chunked.low_precision", lambda x: torch.bfloat16)
    tensors = mlstm_inputs(256, spread=1.0, dtype=torch.float32, sizes=(2, 2, 32, 32))
    tensors = {name: x.bfloat16() if name in ("q", "k", "v") else x for name, x in tensors.items()}
    exact = {name: x.double() for name, x in tensors.items()}
    found = evaluate(flat("mlstm"), tensors, backend="chunked")
    expected = evaluate(flat("mlstm"), exact, backend="reference")
    outputs = [name for name in expected if name.startswith("output")]
    assert_close({n: found[n] for n in outputs}, {n: expected[n] for n in outputs}, 5e-3, 2e-2)
    rest = [name for name in expected if name not in outputs]
    assert_close({n: found[n] for n in rest}, {n: expected[n] for n in rest}, 8e-3, 2e-2)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_prefix_then_rest_equals_whole(op, backend, assert_close):
    tensors = INPUTS[op](130)
    whole = named(op, flat(op)(**tensors, backend=backend))
    first, *middle = flat(op)(**cut(tensors, 0, 47), backend=backend)
    rest = cut(tensors, 47, 130) | dict(zip(STATES[op], middle, strict=True))
    second, *end = flat(op)(**rest, backend=backend)
    assert_close(named(op, (torch.cat([first, second], 1), *end)), whole, 1e-12)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_packed_equals_separate(op, backend, assert_close):
    tensors = INPUTS[op](PACKED[-1], b=1, n=len(PACKED) - 1)
    h, *states = flat(op)(**tensors, cu_seqlens=torch.tensor(PACKED, dtype=torch.int32), backend=backend)
    for i, (begin, end) in enumerate(zip(PACKED, PACKED[1:], strict=False)):
        before = {name: tensors[name][i : i + 1] for name in STATES[op]}
        after = [x[i : i + 1] for x in states]
        if begin == end:
            assert all(torch.equal(x, y) for x, y in zip(after, before.values(), strict=True))
            continue
        single = flat(op)(**cut(tensors, begin, end) | before, backend=backend)
        assert_close(named(op, (h[:, begin:end], *after)), named(op, single), 1e-12)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_only_empty_sequences(op, backend):
    tensors = INPUTS[op](0, b=1, n=2)
    h, *states = flat(op)(**tensors, cu_seqlens=torch.zeros(3, dtype=torch.int32), backend=backend)
    assert h.shape[1] == 0
    assert all(torch.equal(x, tensors[name]) for name, x in zip(STATES[op], states, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("with_state", [True, False])
def test_steps_equal_the_op(op, with_state, assert_close):
    """A state of zeros is the fresh one."""
    tensors = INPUTS[op](9)
    given = {name: tensors.pop(name) if with_state else torch.zeros_like(tensors.pop(name)) for name in STATES[op]}
    expected = named(op, flat(op)(**tensors, **(given if with_state else {})))
    state = tuple(x.clone() for x in given.values())
    rows = [STEPS[op](**cut(tensors, t, t + 1), state=state) for t in range(9)]
    assert_close(named(op, (torch.cat(rows, 1), *state)), expected, 1e-12)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    names, leaves = zip(*INPUTS[op](5).items(), strict=True)
    leaves = tuple(x.requires_grad_() for x in leaves)

    def run(*tensors):
        return flat(op)(**dict(zip(names, tensors, strict=True)), backend="chunked")

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


# torch's own tracer instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("op", OPS)
def test_compiles_in_one_graph(op, evaluate, assert_close):
    t = 70 if op == "mlstm" else 6  # the loop of the sLSTM is unrolled
    tensors = INPUTS[op](t, b=1, n=3, dtype=torch.float32)
    options = {"cu_seqlens": torch.tensor([0, 1, 1, t], dtype=torch.int32)}
    compiled = torch.compile(flat(op), fullgraph=True, backend="aot_eager", dynamic=False)
    expected = evaluate(flat(op), tensors, **options)
    assert_close(evaluate(compiled, tensors, **options), expected, 1e-5, 1e-4)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_minus_infinity_writes_nothing(op, backend, evaluate):
    """Left padding with closed input and open forget gates leaves the fresh state as it was, with finite gradients."""
    tensors = INPUTS[op](70, with_state=False)
    expected = flat(op)(**tensors, backend=backend)
    padded = {
        name: x if name == "recurrent" else F.pad(x.transpose(1, -1), [5, 0]).transpose(1, -1)
        for name, x in tensors.items()
    }
    padded["input_gate"][:, :5], padded["forget_gate"][:, :5] = -torch.inf, torch.inf
    h, *states = flat(op)(**padded, backend=backend)
    assert not h[:, :5].any()
    for have, want in zip((h[:, 5:], *states), expected, strict=True):
        torch.testing.assert_close(have, want)
    assert all(x.isfinite().all() for x in evaluate(flat(op), padded, backend=backend).values())


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_gates_and_states_in_fp32(op):
    tensors = INPUTS[op](70, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, *states = flat(op)(**tensors)
    low = {n: x.bfloat16() if n in ("q", "k", "v", "cell_input") else x for n, x in tensors.items()}
    assert h.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in states)
    assert torch.equal(h, flat(op)(**low)[0])


BAD = [
    ("mlstm", {"input_gate": None}, "input_gate is NoneType"),
    ("mlstm", {"forget_gate": torch.rand(2, 4, 3)}, "forget_gate has shape"),
    ("mlstm", {"input_gate": torch.rand(2, 4, 2)}, "input_gate has dtype torch.float32"),
    ("mlstm", {"C": torch.zeros(2, 2, 5, 4, dtype=D64)}, "C of initial_state has shape"),
    ("mlstm", {"m": torch.zeros(2, 2)}, "m of initial_state has dtype"),
    ("mlstm", {"k": torch.zeros(2, 4, 1, 4, dtype=D64)}, "k has shape"),
    ("mlstm", {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "with cu_seqlens it must be 1"),
    ("slstm", {"cell_input": torch.zeros(2, 4, 6)}, "cell_input has shape"),
    ("slstm", {"cell_input": torch.zeros(2, 4, 2, 3, dtype=torch.int32)}, "cell_input has dtype"),
    ("slstm", {"output_gate": torch.zeros(2, 4, 2, 4, dtype=D64)}, "output_gate has shape"),
    ("slstm", {"recurrent": torch.zeros(4, 2, 3, 4, dtype=D64)}, "recurrent has shape"),
    ("slstm", {"recurrent": "text"}, "recurrent is str"),
    ("slstm", {"h": torch.zeros(2, 2, 4, dtype=D64)}, "h of initial_state has shape"),
]


@pytest.mark.parametrize(("op", "change", "message"), BAD)
def test_bad_calls_name_the_argument(op, change, message):
    with pytest.raises(ValueError, match=message):
        flat(op)(**INPUTS[op](4) | change)


@pytest.mark.parametrize("op", OPS)
def test_states_are_tuples_of_their_parts(op):
    tensors = INPUTS[op](1, with_state=False)
    with pytest.raises(ValueError, match="initial_state is Tensor; it must be a tuple of the"):
        OPS[op](**tensors, initial_state=torch.zeros(1))
    with pytest.raises(ValueError, match="state is 1 items"):
        STEPS[op](**tensors, state=(torch.zeros(1),))
    with pytest.raises(ValueError, match="state is NoneType"):
        STEPS[op](**tensors, state=None)
    with pytest.raises(ValueError, match="exactly one token"):
        STEPS[op](**INPUTS[op](2, with_state=False), state=None)
