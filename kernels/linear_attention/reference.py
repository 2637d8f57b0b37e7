"""Linear attention, token by token; S is [N, Hv, K, V].

S_t = Diag(exp decay_t) S_{t-1} Diag(exp value_decay_t) + k_t^T v_t
o_t = scale q_t S_t
with bonus u:            o_t = scale q_t (S_{t-1} + Diag(u) k_t^T v_t)
with normalize="sum":    v_t gets one more column, of ones; o_t is divided by that column of q_t S_t
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import packed
from zoo.kernels.sequential import State, each_token, zeros

SMALLEST = 1e-6


def run(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, decay, value_decay, bonus, normalize, scale, initial_state, _, cu_seqlens = args
    q, k, v, value_decay = prepare(q, k, v, value_decay, normalize, scale)
    inputs = (q, k, v, packed.per_token(decay, v), value_decay)
    begin = zeros(initial_state, q, v, cu_seqlens)
    o, (state,) = each_token(partial(_token, per_head(bonus)), v, inputs, (begin,), cu_seqlens)
    return finish(o, normalize), state


def _token(
    bonus: Tensor | None, state: State, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, on_values: Tensor | None
) -> tuple[Tensor, State]:
    (s,), update = state, k.unsqueeze(-1) * v.unsqueeze(-2)
    early = None if bonus is None else s + bonus * update
    if decay is not None:
        s = s * decay.exp().unsqueeze(-1)
    if on_values is not None:
        s = s * on_values.exp().unsqueeze(-2)
    s = s + update
    return (q.unsqueeze(-2) @ (s if early is None else early)).squeeze(-2), (s,)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, value_decay: Tensor | None, normalize: str | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `packed.prepare`; under normalize="sum" v gains a column of ones that never decays, and the scale cancels."""
    q, k, v = packed.prepare(q, k, v, scale=scale if normalize is None else 1.0)
    if normalize is None:
        return q, k, v, value_decay
    return q, k, F.pad(v, [0, 1], value=1.0), None if value_decay is None else F.pad(value_decay, [0, 1])


def per_head(bonus: Tensor | None) -> Tensor | None:
    """[Hv] or [Hv, K] to [Hv, 1 or K, 1]."""
    return None if bonus is None else bonus.reshape(bonus.shape[0], -1, 1)


def finish(o: Tensor, normalize: str | None) -> Tensor:
    """Divide by the last column, held away from zero with its sign."""
    if normalize is None:
        return o
    d = o[..., -1:]
    return o[..., :-1] / torch.where(d.abs() < SMALLEST, torch.where(d < 0, -SMALLEST, SMALLEST), d)
