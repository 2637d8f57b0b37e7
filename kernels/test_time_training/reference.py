"""Test-time training, token by token; the gradients come from autograd.

With W_0 the weights where the token's mini-batch began, and row_t a factor for its place in the mini-batch,
    g_t = gradient at W_0 of |f(k_t) - v_t|^2 / 2
    S_t = exp(momentum_t) S_{t-1} + lr_t g_t        A_t = exp(decay_t) A_{t-1} + S_t        r_t = exp(decay_t) r_{t-1}
    W_t = r_t W_0 - row_t A_t        o_t = f(q_t; W_t)
    after the last token of a mini-batch: W_0 = W_t, A = 0, r = 1; without momentum S_t = lr_t g_t

The state is a tree of tensors, named like the paths of a cache:
    W1, b1 (W2, b2)      weights where the mini-batch began         [N, Hv, ...]
    gradient/W1, ..      sum of this mini-batch's gradients, A      [N, Hv, ...]
    momentum/W1, ..      with momentum: S                           [N, Hv, ...]
    retained             with decay: what is left of the weights, r [N, Hv]
    offset               tokens seen of this mini-batch             [N], int32

Shapes: B batch, N sequences, Hv value heads; weights [N, Hv, ...].
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import count_sequences
from zoo.kernels.packed import prepare
from zoo.kernels.sequential import State, each_token

Weights = tuple[Tensor, ...]
WEIGHTS = {"linear": ("W1", "b1"), "mlp": ("W1", "b1", "W2", "b2")}
OFFSET = "offset"
EPSILON = 1e-6


def run(*args: Any) -> tuple[Tensor, dict[str, Tensor]]:
    q, k, v, lr, weights, inner, norm, momentum, decay, position_scale, mini_batch, initial_state, _, cu_seqlens = args
    has, n = (momentum is not None, decay is not None), count_sequences(q, cu_seqlens)
    initial_state, keys = begin(weights, inner, has, initial_state, n)
    q, k, v = prepare(q, k, v)
    rows = lr.new_ones(mini_batch) if position_scale is None else position_scale
    token = partial(_token, len(WEIGHTS[inner]), norm, rows.expand(lr.shape[2], -1))
    keys = [*keys, OFFSET]
    start = tuple(initial_state[key] for key in keys)
    o, state = each_token(token, v, (q, k, v, lr, momentum, decay), start, cu_seqlens)
    return o, dict(zip(keys, state, strict=True))


def _token(count: int, norm: Any, rows: Tensor, state: State, *inputs: Any) -> tuple[Tensor, State]:
    """`rows` [Hv, C]; `state` as its names list it, with `count` weights; the inputs [B, Hv, ...]."""
    q, k, v, lr, momentum, decay = inputs
    weights, total, rest, offset = state[:count], state[count : 2 * count], state[2 * count : -1], state[-1]
    step = tuple(scaled(lr, g) for g in torch.func.grad(_loss)(weights, norm, k, v))
    if momentum is not None:
        step = tuple(scaled(momentum.exp(), s) + g for s, g in zip(rest[:count], step, strict=True))
    left = torch.ones_like(lr) if decay is None else decay.exp()
    total = tuple(scaled(left, a) + s for a, s in zip(total, step, strict=True))
    retained = left if decay is None else left * rest[-1]
    row = rows[:, offset.long()].mT
    now = tuple(scaled(retained, w) - scaled(row, a) for w, a in zip(weights, total, strict=True))
    offset = (offset + 1) % rows.shape[-1]
    full = offset == 0
    weights = tuple(choose(full, new, old) for new, old in zip(now, weights, strict=True))
    total = tuple(choose(full, torch.zeros_like(a), a) for a in total)
    kept = () if decay is None else (choose(full, torch.ones_like(retained), retained),)
    return _model(now, norm, q), (*weights, *total, *(step if momentum is not None else ()), *kept, offset)


def _loss(weights: Weights, norm: Any, k: Tensor, v: Tensor) -> Tensor:
    return (_model(weights, norm, k) - v).square().sum() / 2


def _model(weights: Weights, norm: Any, x: Tensor) -> Tensor:
    """f(x) [B, Hv, V] of x [B, Hv, K]."""
    z = torch.einsum("bhk,bhkv->bhv", x, weights[0]) + weights[1]
    if len(weights) == 4:
        z = torch.einsum("bhk,bhkv->bhv", F.gelu(z, approximate="tanh"), weights[2]) + weights[3]
    return finish(z, x, norm)


def finish(z: Tensor, x: Tensor, norm: Any) -> Tensor:
    """f(x) from the last layer's result; the norm's weight and bias broadcast."""
    return z if norm is None else x + F.layer_norm(z, z.shape[-1:], eps=EPSILON) * norm[0] + norm[1]


def scaled(factor: Tensor, x: Tensor) -> Tensor:
    """A factor [B, Hv] on weights [B, Hv, ...]."""
    return factor.view(*factor.shape, *[1] * (x.dim() - 2)) * x


def choose(where: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return torch.where(where.view(-1, *[1] * (x.dim() - 1)), x, other)


def names(inner: str, momentum: bool, decay: bool) -> list[str]:
    """The float tensors of a state, in the order in which the backends carry them."""
    own = WEIGHTS[inner]
    found = [*own, *(f"gradient/{name}" for name in own)]
    if momentum:
        found += [f"momentum/{name}" for name in own]
    return [*found, "retained"] if decay else found


def test_time_training_state(
    weights: Mapping[str, Tensor], sequences: int, *, inner: str = "linear", momentum: bool = False,
    decay: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """The state before the first token of `sequences` sequences; `momentum` and `decay` say whether the calls have
    them. A later step overwrites its tensors."""
    own = {name: weights[name].expand(sequences, *weights[name].shape).clone() for name in WEIGHTS[inner]}
    sums = (name for name in names(inner, momentum, decay) if "/" in name)
    found = own | {name: torch.zeros_like(own[name.partition("/")[2]]) for name in sums}
    if decay:
        found["retained"] = torch.ones_like(own["b1"][..., 0])
    found[OFFSET] = torch.zeros(sequences, dtype=torch.int32, device=own["b1"].device)
    return found


def begin(weights: Mapping[str, Tensor], inner: str, has: tuple[bool, bool], state: Any, n: int) -> Any:
    """The state that n sequences begin with, and the names of its float tensors; `has` momentum and decay."""
    if state is None:
        state = test_time_training_state(weights, n, inner=inner, momentum=has[0], decay=has[1])
    return state, names(inner, *has)
