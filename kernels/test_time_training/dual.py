"""One mini-batch of test-time training by products between its tokens.

All gradients of a mini-batch are taken at W_0, where token j's is X_j^T E_j, so that
    x W_t = r_t x W_0 - row_t (d_t x A_in + s_t x S_in + sum over j <= t of c_tj (x . X_j) E_j)
with A_in and S_in as they enter, d and s what decay and momentum leave of them, and c = D M Diag(lr) for the matrices
D and M of decay and momentum between any two tokens. Places without a token have no inputs and change nothing.

Shapes: B batch, C tokens, Hv value heads, K and V widths of a layer; inputs are [B, Hv, C, ...], weights [B, Hv, ...].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.decays import HeadDecay, NoDecay
from zoo.kernels.sequential import State
from zoo.kernels.test_time_training import inner
from zoo.kernels.test_time_training.reference import choose, scaled

Layer = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Gates:
    """How much of each gradient, and of the sums that enter, the sum A and the momentum S hold after each token."""

    total: Tensor  # [B, Hv, C, C] c, of gradient j in A_t
    since: Tensor  # [B, Hv, C, 1] d, of A_in in A_t
    moved: Tensor | None = None  # [B, Hv, C, 1] s, of S_in in A_t
    moving: Tensor | None = None  # [B, Hv, C] of each gradient in the last S
    kept: Tensor | None = None  # [B, Hv] of S_in in the last S


def gates(lr: Tensor, momentum: Tensor | None, decay: Tensor | None, there: Tensor | None) -> Gates:
    one = torch.ones_like(lr).unsqueeze(-1)
    fade = NoDecay(None) if decay is None else HeadDecay(decay, None)
    between, since = fade.scores(one, one), fade.from_start(one)
    if momentum is None:
        return Gates(between * lr.unsqueeze(-2), since)
    if there is not None:
        between = between * there.unsqueeze(-2)  # A takes up S once per token
    move = HeadDecay(momentum, None)
    steps, left = move.scores(one, one) * lr.unsqueeze(-2), move.from_start(one)
    return Gates(between @ steps, since, between @ left, steps[..., -1, :], left[..., -1, 0])


def advance(
    count: int,
    norm: Any,
    rows: Tensor | None,
    last_row: Tensor | None,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    there: Tensor | None,
    full: bool | Tensor,
) -> tuple[Tensor, State]:
    """o [B, Hv, C, V] and the state after the tokens.

    `state` holds `count` weights, as many sums, as many momenta where there is momentum, and what is retained where
    there is decay; an entry that is None is at its start. `rows` broadcasts to [B, Hv, C, 1], `last_row` to [B, Hv] and
    `there` (1 at places with a token, 0 elsewhere; None is 1) to [B, Hv, C]. `full` says whether the last place ends a
    mini-batch, for all or for each of B.
    """
    weights, total, rest = state[:count], state[count : 2 * count], state[2 * count :]
    moving = rest[:count] if momentum is not None else (None,) * count
    gate, left = gates(lr, momentum, decay, there), None
    if decay is not None:
        left = gate.since if rest[-1] is None else gate.since * rest[-1][..., None, None]
    gradients = inner.errors(inner.layers(weights), k, v, norm)
    o = inner.finish(_read(q, weights, total, moving, gradients, gate, left, rows), q, norm)
    total, moving = _sums(total, moving, gradients, gate)
    kept = () if left is None else (left[..., -1, 0],)
    state = _fold(weights, total, kept, last_row, full)
    return o, (*state[: 2 * count], *(moving if momentum is not None else ()), *state[2 * count :])


def _read(
    x: Tensor,
    weights: State,
    total: State,
    moving: State,
    gradients: list[Layer],
    gate: Gates,
    left: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    """The last layer's result at W_t for the x of token t."""
    groups = (zip(y[::2], y[1::2], strict=True) for y in (weights, total, moving))
    for i, (own, sums, moves, (entering, error)) in enumerate(zip(*groups, gradients, strict=True)):
        x = inner.activate(x) if i else x
        past = (gate.total * (x @ entering.mT + 1)) @ error  # 1 for the bias
        if sums[0] is not None:
            past = past + gate.since * inner.apply(sums, x)
        if moves[0] is not None and gate.moved is not None:
            past = past + gate.moved * inner.apply(moves, x)
        now = inner.apply(own, x)
        x = (now if left is None else left * now) - (past if rows is None else rows * past)
    return x


def _sums(total: State, moving: State, gradients: list[Layer], gate: Gates) -> tuple[State, State]:
    """A and S after the last token."""
    totals = _gathered(gradients, gate.total[..., -1, :])
    totals = _plus(totals, total, gate.since[..., -1, 0])
    if gate.moving is None or gate.moved is None:
        return totals, moving
    totals = _plus(totals, moving, gate.moved[..., -1, 0])
    return totals, _plus(_gathered(gradients, gate.moving), moving, gate.kept)


def _gathered(gradients: list[Layer], share: Tensor) -> State:
    """Sums of the tokens' gradients for every weight, each token's times `share` [B, Hv, C]."""
    shared = [(entering, share.unsqueeze(-1) * error) for entering, error in gradients]
    return tuple(y for entering, error in shared for y in (entering.mT @ error, error.sum(-2)))


def _plus(sums: State, before: State, factor: Tensor | None) -> State:
    if factor is None or before[0] is None:
        return sums
    return tuple(y + scaled(factor, x) for y, x in zip(sums, before, strict=True))


def _fold(weights: State, total: State, kept: State, last_row: Tensor | None, full: bool | Tensor) -> State:
    """Weights, sums and what is retained: where a mini-batch ends, its sums go into the weights."""
    if full is False:
        return (*weights, *total, *kept)
    ended = weights if not kept else tuple(scaled(kept[0], w) for w in weights)
    step = total if last_row is None else tuple(scaled(last_row, a) for a in total)
    ended = tuple(w - a for w, a in zip(ended, step, strict=True))
    if full is True:
        return (*ended, *[None] * (len(total) + len(kept)))
    assert isinstance(full, Tensor)
    started = [*ended, *(torch.zeros_like(a) for a in total), *(torch.ones_like(r) for r in kept)]
    return tuple(choose(full, new, old) for new, old in zip(started, (*weights, *total, *kept), strict=True))
