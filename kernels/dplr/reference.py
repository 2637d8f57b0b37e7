"""Diagonal-plus-low-rank transitions, token by token; S is [N, Hv, K, V].

S_t = Diag(exp decay_t) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t
o_t = scale q_t S_t
"""

from typing import Any

from torch import Tensor

from zoo.kernels.packed import per_token, prepare
from zoo.kernels.sequential import State, each_token, zeros


def run(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, a, b, decay, scale, initial_state, _, cu_seqlens = args
    q, k, v, a, b = prepare(q, k, v, a, b, scale=scale)
    begin = zeros(initial_state, q, v, cu_seqlens)
    o, (state,) = each_token(_token, v, (q, k, v, a, b, per_token(decay, v)), (begin,), cu_seqlens)
    return o, state


def _token(
    state: State, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor | None
) -> tuple[Tensor, State]:
    (s,), (q, k, v, a, b) = state, (x.unsqueeze(-2) for x in (q, k, v, a, b))
    kept = s if decay is None else s * decay.exp().unsqueeze(-1)
    s = kept + b.mT @ (a @ s) + k.mT @ v
    return (q @ s).squeeze(-2), (s,)
