"""dplr against RWKV-7's own formula, against the delta rule it contains, and over a long roll-out.

Shapes: B batch, T tokens, H heads, K and V head widths.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels import dispatch
from zoo.kernels.decays import ChannelDecay, HeadDecay, NoDecay
from zoo.kernels.delta_rule import delta_rule
from zoo.kernels.dplr import dplr, dplr_step

BACKENDS = [name for name in dispatch.backends("dplr") if name != "triton"]


def rwkv7(t=70, width=8, dtype=torch.float64):
    """Receptance, key, value, kappa, eta and log decay as RWKV-7 makes them: decays of at least exp(-exp(-0.5))."""
    r, k, v, kappa = (torch.randn(2, t, 3, width, dtype=dtype) for _ in range(4))
    eta, decay = (torch.rand(2, t, 3, width, dtype=dtype) for _ in range(2))
    return r, k, v, F.normalize(kappa, dim=-1), eta, -0.606 * decay


def test_equals_the_formula_of_rwkv7():
    """wkv_t = wkv_{t-1} (diag(w_t) - kappa^T (eta * kappa)) + v^T k with value rows and key columns; o = wkv r."""
    r, k, v, kappa, eta, decay = rwkv7()
    state, rows = torch.zeros(2, 3, 8, 8, dtype=torch.float64), []
    for t in range(70):
        erase = torch.einsum("bhi,bhj->bhij", kappa[:, t], kappa[:, t] * eta[:, t])
        write = torch.einsum("bhi,bhj->bhij", v[:, t], k[:, t])
        state = state @ (torch.diag_embed(decay[:, t].exp()) - erase) + write
        rows.append(torch.einsum("bhij,bhj->bhi", state, r[:, t]))
    o, final = dplr(r, k, v, -kappa, kappa * eta, decay, scale=1.0, output_final_state=True)
    torch.testing.assert_close(o, torch.stack(rows, 1))
    torch.testing.assert_close(final, state.mT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [None, (2,), (2, 5), (2, 70, 2), (2, 70, 2, 5)])
def test_contains_the_delta_rule(backend, shape, evaluate, assert_close):
    """The delta rule reads the decayed state: a = -k exp(decay), and both writes carry beta."""
    tensors = {name: torch.randn(2, 70, 2, 5, dtype=torch.float64) for name in ("q", "v")}
    tensors["k"] = F.normalize(torch.randn(2, 70, 2, 5, dtype=torch.float64), dim=-1)
    tensors["beta"] = 2 * torch.rand(2, 70, 2, dtype=torch.float64)
    tensors["decay"] = None if shape is None else -torch.rand(shape, dtype=torch.float64)

    def through_dplr(q, k, v, beta, decay=None):
        weak = 1.0 if decay is None else decay.exp()
        if decay is not None and decay.dim() in (1, 3):
            weak = weak.unsqueeze(-1)
        written = k * beta.unsqueeze(-1)
        return dplr(q, written, v, -k * weak, written, decay, output_final_state=True, backend=backend)

    expected = evaluate(delta_rule, tensors, output_final_state=True, backend="reference")
    assert_close(evaluate(through_dplr, tensors), expected, 1e-10)


def test_without_feedback_it_is_linear_attention():
    from zoo.kernels.linear_attention import linear_attention

    r, k, v, kappa, _, decay = rwkv7()
    o, _ = dplr(r, k, v, -kappa, torch.zeros_like(k), decay)
    expected, _ = linear_attention(r, k, v, decay)
    torch.testing.assert_close(o, expected)


def test_long_roll_out_in_bf16_stays_near_fp64(assert_close):
    names = ("q", "k", "v", "a", "b")
    r, k, v, kappa, eta, decay = rwkv7(t=2000, width=16)
    low = dict(zip(names, (x.bfloat16() for x in (r, k, v, -kappa, kappa * eta)), strict=True))
    exact = {name: x.double() for name, x in low.items()}
    options = {"scale": 1.0, "output_final_state": True}
    o, state = dplr(**low, decay=decay.float(), **options)
    expected, final = dplr(**exact, decay=decay.float().double(), **options)
    assert_close({"o": o, "state": state}, {"o": expected, "state": final}, 5e-3, 2e-2)


def test_steps_follow_a_prefill():
    r, k, v, kappa, eta, decay = rwkv7(t=20, dtype=torch.float32)
    inputs = (r, k, v, -kappa, kappa * eta, decay)
    o, final = dplr(*inputs, output_final_state=True)
    _, state = dplr(*(x[:, :12] for x in inputs), output_final_state=True)
    rows = [dplr_step(*(x[:, t : t + 1] for x in inputs), state=state) for t in range(12, 20)]
    torch.testing.assert_close(torch.cat(rows, 1), o[:, 12:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [NoDecay, HeadDecay, ChannelDecay])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_crossed_scores_are_the_single_ones(kind, size):
    shape = (2, size) if kind is HeadDecay else (2, size, 3)
    step = -torch.rand(shape, dtype=torch.float64)
    decay = NoDecay(None) if kind is NoDecay else kind(step, None)
    rows, columns = (torch.randn(3, 2, size, 3, dtype=torch.float64).unbind(0) for _ in range(2))
    for q, found in zip(rows[:2], decay.cross(rows[:2], columns), strict=True):
        for k, scores in zip(columns, found, strict=True):
            torch.testing.assert_close(scores, decay.scores(q, k))


@pytest.mark.parametrize("name", ["a", "b"])
def test_bad_low_rank_vectors_are_named(name):
    x = torch.randn(1, 4, 2, 3)
    good = dict.fromkeys(("q", "k", "v", "a", "b"), x)
    bad = {torch.randn(1, 4, 1, 3): "has shape", x.double(): "has dtype", None: "is NoneType", "x": "is str"}
    for value, message in bad.items():
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            dplr(**good | {name: value})
    with pytest.raises(ValueError, match="state has shape"):
        dplr_step(*[x[:, :1]] * 5, state=torch.zeros(1, 2, 3, 4))
