"""Test-time training in its dual form: all tokens of a mini-batch by products between them, one mini-batch after the
other.

All gradients of a mini-batch are taken at W_0, where token j's is X_j^T E_j, so that
    x W_t = r_t x W_0 - row_t (d_t x A_in + s_t x S_in + sum over j <= t of c_tj (x . X_j) E_j)
with A_in and S_in as they enter, d and s what decay and momentum leave of them, and c = D M Diag(lr) for the matrices
D and M of decay and momentum between any two tokens. Places without a token have no inputs and change nothing.

The gradient of the inner model is written out, so that autograd sees plain products. A layer is (W [.., F, V],
b [.., V]); the gradient of a token is X_t^T E_t for W and E_t for b, with X [.., C, F] what enters the layer and
E [.., C, V] the gradient of the loss where the layer's result leaves it.

Shapes: `..` is [B, Hv]; B batch, T tokens, C tokens of a mini-batch, M mini-batches, N sequences, Hv value heads, K and
V widths of a layer, F hidden width; chunked arrays are [M, B, Hv, C, ...], weights [B, Hv, ...].
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import count_sequences
from zoo.kernels.chunks import Chunks, packed
from zoo.kernels.decays import HeadDecay, NoDecay
from zoo.kernels.packed import prepare
from zoo.kernels.sequential import State, each_chunk
from zoo.kernels.test_time_training.reference import EPSILON, OFFSET, WEIGHTS, begin, choose, finish, scaled

Layer = tuple[Tensor, Tensor]
Norm = tuple[Tensor, Tensor]


def run(*args: Any) -> tuple[Tensor, dict[str, Tensor]]:
    q, k, v, lr, weights, inner, norm, momentum, decay, position_scale, mini_batch, initial_state, _, cu_seqlens = args
    has, count, n = (momentum is not None, decay is not None), len(WEIGHTS[inner]), count_sequences(q, cu_seqlens)
    plan = _layout(q.shape[1], mini_batch, cu_seqlens, None if initial_state is None else initial_state[OFFSET])
    initial_state, keys = begin(weights, inner, has, initial_state, n)
    parts = [None if x is None else plan.split(x) for x in (*prepare(q, k, v), lr, momentum, decay)]
    there = plan.split(torch.ones_like(lr[:, :, :1]))  # 1 where a token is, 0 elsewhere
    full: Any = there[:, :, 0, -1] > 0  # whether each mini-batch ends with its last token
    start: State = tuple(initial_state[key] for key in keys)
    if plan.slots is None:  # every mini-batch begins afresh, and no value tells which of them end
        start = (*start[:count], *[None] * (len(start) - count))
        full = [(m + 1) * mini_batch <= plan.length for m in range(plan.count)]
    rows = None if position_scale is None else position_scale[..., : plan.size, None]
    last_row = None if position_scale is None else position_scale[..., -1].reshape(1, -1)
    o, state = each_chunk(plan, partial(advance, count, norm, rows, last_row), start, [*parts, there, full])
    ended = {key: initial_state[key] if x is None else x for key, x in zip(keys, state, strict=True)}
    lengths = q.shape[1] if cu_seqlens is None else cu_seqlens.diff()
    return plan.join(o), ended | {OFFSET: ((initial_state[OFFSET] + lengths) % mini_batch).to(torch.int32)}


def _layout(length: int, size: int, cu_seqlens: Tensor | None, offset: Tensor | None) -> Chunks:
    """Mini-batches count the tokens of each sequence, and the first may have begun in an earlier call: `offset` [N] is
    the place of the first token in it. No value is read on the host: as many are laid out as always suffice."""
    if cu_seqlens is not None:
        return packed(length, cu_seqlens, size, offset)
    if offset is None:
        return Chunks(length, min(size, length), -(-length // size))
    count, token = -(-(length + size - 1) // size), torch.arange(length, device=offset.device)
    start = torch.arange(offset.shape[0], device=offset.device) * (count * size) + offset
    return Chunks(length, size, count, (start[:, None] + token).flatten())


def gates(lr: Tensor, momentum: Tensor | None, decay: Tensor | None, there: Tensor | None) -> tuple[Any, ...]:
    """What the sum A and the momentum S hold after each token: A of every gradient, c [B, Hv, C, C], and of A_in, d
    [B, Hv, C, 1]; and with momentum A of S_in, s, and S of every gradient and of S_in."""
    one = torch.ones_like(lr).unsqueeze(-1)
    fade = NoDecay(None) if decay is None else HeadDecay(decay, None)
    between, since = fade.scores(one, one), fade.from_start(one)
    if momentum is None:
        return between * lr.unsqueeze(-2), since, None, None, None
    if there is not None:
        between = between * there.unsqueeze(-2)  # A takes up S once per token
    move = HeadDecay(momentum, None)
    steps, left = move.scores(one, one) * lr.unsqueeze(-2), move.from_start(one)
    return between @ steps, since, between @ left, steps, left


def advance(count: int, norm: Any, rows: Any, last_row: Any, state: State, *inputs: Any) -> tuple[Tensor, State]:
    """o [B, Hv, C, V] and the state after the tokens.

    `state` holds `count` weights, as many sums, as many momenta where there is momentum, and what is retained where
    there is decay; an entry that is None is at its start. `rows` broadcasts to [B, Hv, C, 1] and `last_row` to [B, Hv].
    The inputs are q, k, v, lr, momentum, decay, `there` (1 at places with a token, 0 elsewhere; None is 1) and `full`:
    whether the last place ends a mini-batch, for all or for each of B.
    """
    x, k, v, lr, momentum, decay, there, full = inputs
    weights, total, rest = state[:count], state[count : 2 * count], state[2 * count :]
    moving: State = rest[:count] if momentum is not None else (None,) * count
    shares, since, moved, steps, left = gates(lr, momentum, decay, there)
    norm = None if norm is None else tuple(y.unsqueeze(-2) for y in norm)
    retained = None if decay is None else since if rest[-1] is None else since * rest[-1][..., None, None]
    gradients = errors(layers(weights), k, v, norm)
    each = zip(*(layers(y) for y in (weights, total, moving)), gradients, strict=True)
    for i, (own, sums, moves, (entering, error)) in enumerate(each):
        x = F.gelu(x, approximate="tanh") if i else x
        past = (shares * (x @ entering.mT + 1)) @ error  # 1 for the bias
        if sums[0] is not None:
            past = past + since * apply(sums, x)
        if moves[0] is not None:
            past = past + moved * apply(moves, x)
        now = apply(own, x)
        x = (now if retained is None else retained * now) - (past if rows is None else rows * past)
    total = _summed(gradients, shares, (total, since), (moving, moved))
    moving = () if momentum is None else _summed(gradients, steps, (moving, left))
    state = _fold(weights, total, () if retained is None else (retained[..., -1, 0],), last_row, full)
    return finish(x, inputs[0], norm), (*state[: 2 * count], *moving, *state[2 * count :])


def _summed(gradients: list[Layer], shares: Tensor, *before: tuple[State, Tensor | None]) -> State:
    """For every weight what the last token's row of `shares` [B, Hv, C, C] takes of the gradients, and of the sums
    `before`, where there are any, by factors [B, Hv, C, 1]."""
    shared = [(entering, shares[..., -1, :, None] * error) for entering, error in gradients]
    sums = [y for entering, error in shared for y in (entering.mT @ error, error.sum(-2))]
    for earlier, factor in before:
        if earlier[0] is not None and factor is not None:
            sums = [y + scaled(factor[..., -1, 0], x) for y, x in zip(sums, earlier, strict=True)]
    return tuple(sums)


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


def layers(weights: tuple[Any, ...]) -> list[Layer]:
    """(W1, b1, W2, b2) in pairs."""
    return list(zip(weights[::2], weights[1::2], strict=True))


def apply(layer: Layer, x: Tensor) -> Tensor:
    return x @ layer[0] + layer[1].unsqueeze(-2)


def errors(model: list[Layer], k: Tensor, v: Tensor, norm: Norm | None) -> list[tuple[Tensor, Tensor]]:
    """(X, E) of every layer for the loss |f(k) - v|^2 / 2."""
    entering, results = [k], [apply(model[0], k)]
    for layer in model[1:]:
        entering.append(F.gelu(results[-1], approximate="tanh"))
        results.append(apply(layer, entering[-1]))
    found = [_last_error(results[-1], k, v, norm)]
    for (w, _), z in zip(model[:0:-1], results[-2::-1], strict=True):
        found.append(torch.ops.aten.gelu_backward(found[-1] @ w.mT, z, approximate="tanh"))
    return list(zip(entering, found[::-1], strict=True))


def _last_error(z: Tensor, k: Tensor, v: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return z - v
    weight, bias = norm
    centred = z - z.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    unit = centred * inverse
    error = (unit * weight + bias + k - v) * weight
    return inverse * (error - error.mean(-1, keepdim=True) - unit * (error * unit).mean(-1, keepdim=True))
