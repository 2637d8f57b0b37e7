"""What linear_attention alone can do: decay on the value axis, bonus, normalisation.

Shapes: B batch, T tokens, Hv value heads, K and V head widths.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from zoo.kernels import dispatch
from zoo.kernels.linear_attention import linear_attention, linear_attention_step

BACKENDS = [name for name in dispatch.backends("linear_attention") if name not in ("reference", "triton")]
OPTIONS = list(itertools.product([False, True], ["none", "head", "channel"], [None, "sum"]))[1:]


def inputs(t, value_decay, bonus, normalize, *, form="token channel", strength=1.0):
    b, hv, k, v = 2, 2, 4, 3
    shape = {"none": None, "token head": (b, t, hv), "token channel": (b, t, hv, k)}[form]
    made = {
        "q": torch.rand(b, t, 1, k, dtype=torch.float64),
        "k": torch.rand(b, t, 1, k, dtype=torch.float64),
        "v": torch.randn(b, t, hv, v, dtype=torch.float64),
        "decay": None if shape is None else -strength * torch.rand(shape, dtype=torch.float64) ** 2,
        "initial_state": torch.rand(b, hv, k, v + (normalize == "sum"), dtype=torch.float64),
    }
    if value_decay:
        made["value_decay"] = -strength * torch.rand(b, t, hv, v, dtype=torch.float64) ** 2
    if bonus != "none":
        made["bonus"] = torch.rand((hv,) if bonus == "head" else (hv, k), dtype=torch.float64)
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("value_decay", "bonus", "normalize"), OPTIONS)
@pytest.mark.parametrize("form", ["none", "token head", "token channel"])
def test_options_equal_the_token_loop(backend, value_decay, bonus, normalize, form, evaluate, assert_close):
    tensors = inputs(67, value_decay, bonus, normalize, form=form)
    options = {"normalize": normalize, "output_final_state": True}
    expected = evaluate(linear_attention, tensors, backend="reference", **options)
    assert_close(evaluate(linear_attention, tensors, backend=backend, **options), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bonus", ["none", "channel"])
@pytest.mark.parametrize("strength", [30.0, 1e4])
def test_strong_value_decay(backend, bonus, strength, evaluate, assert_close):
    tensors = inputs(67, True, bonus, None, strength=strength)
    expected = evaluate(linear_attention, tensors, output_final_state=True, backend="reference")
    assert_close(evaluate(linear_attention, tensors, output_final_state=True, backend=backend), expected, 1e-10)


@pytest.mark.parametrize(("value_decay", "bonus", "normalize"), OPTIONS)
def test_steps_equal_the_op(value_decay, bonus, normalize, assert_close):
    tensors = inputs(6, value_decay, bonus, normalize)
    o, final = linear_attention(**tensors, normalize=normalize, output_final_state=True)
    state, fixed = tensors.pop("initial_state").clone(), tensors.pop("bonus", None)
    steps = [{name: x[:, t : t + 1] for name, x in tensors.items()} for t in range(6)]
    found = [linear_attention_step(**x, bonus=fixed, state=state, normalize=normalize) for x in steps]
    assert_close({"o": torch.cat(found, 1), "state": state}, {"o": o, "state": final}, 1e-12)


def test_normalised_output_is_a_weighted_mean():
    q, k = (torch.rand(1, 80, 2, 4) for _ in range(2))
    o, _ = linear_attention(q, k, torch.full((1, 80, 2, 3), 7.0), normalize="sum")
    torch.testing.assert_close(o, torch.full_like(o, 7.0))


def test_denominator_is_held_away_from_zero():
    q, k = torch.zeros(1, 3, 1, 2), torch.ones(1, 3, 1, 2)
    o, _ = linear_attention(q, k, torch.ones(1, 3, 1, 2), normalize="sum")
    assert torch.equal(o, torch.zeros_like(o))


def test_no_decay_equals_causal_attention_without_softmax():
    q, k, v = (torch.randn(2, 70, 3, 4, dtype=torch.float64) for _ in range(3))
    scores = torch.einsum("bihk,bjhk->bhij", q, k).tril() / 2
    o, _ = linear_attention(q, k, v)
    torch.testing.assert_close(o, torch.einsum("bhij,bjhv->bihv", scores, v))


def test_equals_the_state_space_scan_of_mamba2():
    """exp of the decays summed between two tokens weighs q_i . k_j, as in the paper's 1-semiseparable matrix."""
    q, k, v = (torch.randn(1, 70, 2, 4, dtype=torch.float64) for _ in range(3))
    decay = -torch.rand(1, 70, 2, dtype=torch.float64)
    total = decay.cumsum(1).transpose(1, 2)
    weight = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    expected = torch.einsum("bihk,bjhk,bhij,bjhv->bihv", q, k, weight, v)
    o, _ = linear_attention(q, k, v, decay, scale=1.0)
    torch.testing.assert_close(o, expected)
