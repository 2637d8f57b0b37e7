"""Test-time training, token by token; the gradients come from autograd.

    g_t = gradient at W_0 of |f(k_t) - v_t|^2 / 2
    S_t = exp(momentum_t) S_{t-1} + lr_t g_t        A_t = exp(decay_t) A_{t-1} + S_t        r_t = exp(decay_t) r_{t-1}
    W_t = r_t W_0 - row_t A_t        o_t = f(q_t; W_t)
    after the last token of a mini-batch: W_0 = W_t, A = 0, r = 1

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths; weights [N, Hv, ...].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import count_sequences, state_dtype
from zoo.kernels.packed import heads
from zoo.kernels.sequential import State, each_sequence
from zoo.kernels.test_time_training.states import OFFSET, WEIGHTS, names, test_time_training_state

Weights = tuple[Tensor, ...]


def supports(*args: object) -> str | None:
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: Mapping[str, Tensor],
    inner: str,
    norm: Any,
    momentum: Tensor | None,
    decay: Tensor | None,
    position_scale: Tensor | None,
    mini_batch: int,
    initial_state: Mapping[str, Tensor] | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    dtype, has = q.dtype, (momentum is not None, decay is not None)
    if initial_state is None:
        n = count_sequences(q, cu_seqlens)
        initial_state = test_time_training_state(weights, n, inner=inner, momentum=has[0], decay=has[1])
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = prepare(q, k, v)
        rows = lr.new_ones(mini_batch) if position_scale is None else position_scale
        loop = partial(_tokens, len(WEIGHTS[inner]), norm, rows.expand(lr.shape[2], -1))
        keys = [*names(inner, *has), OFFSET]
        begin = tuple(initial_state[key] for key in keys)
        o, state = each_sequence(loop, (q, k, v, lr, momentum, decay), begin, cu_seqlens)
        return o.to(dtype), dict(zip(keys, state, strict=True)) if output_final_state else None


def _tokens(count: int, norm: Any, rows: Tensor, state: State, *inputs: Tensor | None) -> tuple[Tensor, State]:
    """`rows` [Hv, C]; `state` as its names list it, with `count` weights; the inputs [B, T, Hv, ...]."""
    values: Any = inputs[2]
    outputs = [values[:, :0]]
    for t in range(values.shape[1]):
        now: list[Any] = [None if x is None else x[:, t] for x in inputs]
        o, state = _token(count, norm, rows, state, *now)
        outputs.append(o[:, None])
    return torch.cat(outputs, 1), state


def _token(
    count: int,
    norm: Any,
    rows: Tensor,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
) -> tuple[Tensor, State]:
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
    return z if norm is None else x + F.layer_norm(z, z.shape[-1:], eps=1e-6) * norm[0] + norm[1]


def scaled(factor: Tensor, x: Tensor) -> Tensor:
    """A factor [B, Hv] on weights [B, Hv, ...]."""
    return factor.view(*factor.shape, *[1] * (x.dim() - 2)) * x


def choose(where: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return torch.where(where.view(-1, *[1] * (x.dim() - 1)), x, other)


def prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in the state dtype with Hv heads."""
    dtype = state_dtype(q.dtype)
    return heads(q.to(dtype), v), heads(k.to(dtype), v), v.to(dtype)
