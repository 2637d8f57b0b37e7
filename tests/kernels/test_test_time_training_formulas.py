"""Test-time training against what can be worked out by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ttt_calls import MINI_BATCH, inputs, split_names

from zoo.kernels import test_time_training as ttt


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
