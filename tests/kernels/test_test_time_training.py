"""Test-time training: the dual form against autograd token by token, any split, packing, steps, TTT by hand.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths, C tokens of a mini-batch.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels import dispatch
from zoo.kernels import test_time_training as ttt

BACKENDS = [name for name in dispatch.backends("test_time_training") if name not in ("reference", "triton")]
MINI_BATCH = 6
PACKED = [0, 0, 1, 5, 5, 13, 21]
KINDS = ["linear", "linear norm rows", "mlp", "mlp norm", "linear decay", "linear norm momentum", "mlp norm all"]
TOKENS = ("q", "k", "v", "lr", "momentum", "decay")


def inputs(kind, t, *, b=2, n=None, dtype=torch.float64, strength=1.0, with_state=True):
    """The tensors of a call under flat names; `call` puts them together."""
    h, hv, k, hidden = 1, 2, 4, 5
    v = k if "norm" in kind else 3
    made = {
        "q": torch.randn(b, t, h, k, dtype=dtype),
        "k": torch.randn(b, t, h, k, dtype=dtype),
        "v": torch.randn(b, t, hv, v, dtype=dtype),
        "lr": 0.1 * torch.rand(b, t, hv, dtype=dtype),
    }
    if "norm" in kind:
        made |= {"norm_weight": torch.rand(hv, v, dtype=dtype) + 0.5, "norm_bias": torch.randn(hv, v, dtype=dtype)}
    for gate in ("momentum", "decay"):
        if gate in kind or "all" in kind:
            made[gate] = -strength * torch.rand(b, t, hv, dtype=dtype)
    if "rows" in kind:
        made["position_scale"] = 1 / torch.arange(1.0, MINI_BATCH + 1, dtype=dtype)
    elif "all" in kind:
        made["position_scale"] = torch.rand(hv, MINI_BATCH, dtype=dtype)
    widths = (k, hidden, v) if kind.startswith("mlp") else (k, v)
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False), 1):
        made[f"weights.W{i}"] = torch.randn(hv, fan_in, fan_out, dtype=dtype) / fan_in**0.5
        made[f"weights.b{i}"] = torch.randn(hv, fan_out, dtype=dtype)
    return made | (state_of(made, kind, n or b, dtype) if with_state else {})


def state_of(made, kind, n, dtype):
    """A random state in the middle of a mini-batch; its offsets are not among the tensors with gradients."""
    weights = {name.partition(".")[2]: x for name, x in made.items() if name.startswith("weights.")}
    has = {"momentum": "momentum" in made, "decay": "decay" in made}
    state = ttt.test_time_training_state(weights, n, inner=kind.split()[0], **has)
    found = {f"state.{name}": x + 0.1 * torch.randn_like(x) for name, x in state.items() if name != "offset"}
    if "decay" in made:
        found["state.retained"] = torch.rand(n, 2, dtype=dtype)
    return found


def offsets(n):
    return (torch.arange(n, dtype=torch.int32) * 4 + 2) % MINI_BATCH


def split_names(tensors):
    """The arguments of the op from flat names."""
    plain = {name: x for name, x in tensors.items() if "." not in name}
    weights = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith("weights.")}
    state = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith("state.")}
    plain |= {"weights": weights, "inner": "mlp" if "W2" in weights else "linear", "mini_batch": MINI_BATCH}
    return plain, state


def call(offset=None, backend=None, cu_seqlens=None, **tensors):
    """o and the float tensors of the final state."""
    plain, state = split_names(tensors)
    begin = state | {"offset": offset} if state else None
    options = {"output_final_state": True, "backend": backend, "cu_seqlens": cu_seqlens}
    o, final = ttt.test_time_training(**plain, initial_state=begin, **options)
    return o, *(x for name, x in final.items() if name != "offset")


def cut(tensors, begin, end):
    return {name: x[:, begin:end] if name in TOKENS else x for name, x in tensors.items()}


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


def test_gradients_of_a_mini_batch_are_taken_where_it_began():
    """Linear, no norm, by hand: within a mini-batch the weights are W - lr k^T (k W - v) summed up to each token."""
    plain, _ = split_names(inputs("linear", MINI_BATCH, b=1, with_state=False))
    weights = {name: torch.zeros_like(x) for name, x in plain["weights"].items()}
    o, state = ttt.test_time_training(**plain | {"weights": weights}, output_final_state=True)
    q, k, v = plain["q"][0, :, 0], plain["k"][0, :, 0], plain["lr"][0, ..., None] * plain["v"][0]
    scores = torch.tril(q @ k.T + 1)  # one more for the bias
    torch.testing.assert_close(o[0], torch.einsum("ij,jhv->ihv", scores, v))
    torch.testing.assert_close(state["W1"][0], torch.einsum("jk,jhv->hkv", k, v))
    assert not state["gradient/W1"].any() and state["offset"].item() == 0


def test_one_token_mini_batches_without_a_norm_are_the_delta_rule():
    from zoo.kernels.delta_rule import delta_rule

    plain, _ = split_names(inputs("linear", 20, with_state=False))
    plain |= {"mini_batch": 1, "weights": {name: torch.zeros_like(x) for name, x in plain["weights"].items()}}
    one = torch.ones_like(plain["k"][..., :1])  # the bias is one more channel of the key
    q, k = (torch.cat([plain[name], one], -1) for name in "qk")
    expected, end = delta_rule(q, k, plain["v"], plain["lr"], scale=1.0, output_final_state=True)
    o, state = ttt.test_time_training(**plain, output_final_state=True)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(torch.cat([state["W1"], state["b1"].unsqueeze(-2)], -2), end)


def test_titans_by_hand():
    """Momentum inside S, decay on the weights, the gradient of one token: M = (1 - a) M + S, S = eta S - theta grad."""
    plain, _ = split_names(inputs("linear momentum decay", 8, b=1, with_state=False))
    weights = plain["weights"]
    o, _ = ttt.test_time_training(**plain | {"mini_batch": 1})
    w, b = weights["W1"], weights["b1"]
    moving = torch.zeros_like(w), torch.zeros_like(b)
    for t in range(8):
        q, k, v = (plain[name][0, t] for name in "qkv")
        error = k @ w - v[:, None] + b[:, None]
        slopes = k.mT * error, error[:, 0]
        eta, keep, theta = plain["momentum"][0, t].exp(), plain["decay"][0, t].exp(), plain["lr"][0, t]
        s_w = eta[:, None, None] * moving[0] - theta[:, None, None] * slopes[0]
        s_b = eta[:, None] * moving[1] - theta[:, None] * slopes[1]
        moving, w, b = (s_w, s_b), keep[:, None, None] * w + s_w, keep[:, None] * b + s_b
        torch.testing.assert_close(o[0, t], (q @ w)[:, 0] + b)


def test_training_on_a_pair_teaches_it():
    """The inner model learns a key's value when it sees the pair again and again."""
    plain, _ = split_names(inputs("mlp norm", 600, b=1, with_state=False))
    plain |= {name: plain[name][:, :1].expand(-1, 600, -1, -1) for name in "kv"}
    plain |= {"q": plain["k"], "lr": torch.full_like(plain["lr"], 0.05), "norm_weight": torch.ones(2, 4).double()}
    target = F.layer_norm(plain["v"] - plain["k"], (4,)) + plain["k"]  # what a norm with these weights can reach
    plain |= {"v": target, "norm_bias": torch.zeros(2, 4).double()}
    o, _ = ttt.test_time_training(**plain)
    first, last = ((o - target)[:, t].norm() for t in (0, -1))
    assert last < 0.05 * first


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
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_in_one_graph(packed, evaluate, assert_close):
    n = 3 if packed else 2
    tensors = inputs("linear norm all", 5, b=1 if packed else 2, n=n, dtype=torch.float32)
    options = {"offset": offsets(n)}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 1, 1, 5], dtype=torch.int32)
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
