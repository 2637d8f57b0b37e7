"""The delta rule, token by token; S is [N, Hv, K, V].

S'  = Diag(exp decay_t) S_{t-1}
S_t = S' + k_t^T beta_t (v_t - k_t S')
o_t = scale q_t S_t
"""

from typing import Any

from torch import Tensor

from zoo.kernels.packed import per_token, prepare
from zoo.kernels.sequential import State, each_token, zeros


def run(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, beta, decay, qk_l2norm, scale, initial_state, _, cu_seqlens = args
    q, k, v = prepare(q, k, v, scale=scale, norm=qk_l2norm)
    begin = zeros(initial_state, q, v, cu_seqlens)
    o, (state,) = each_token(_token, v, (q, k, v, beta, per_token(decay, v)), (begin,), cu_seqlens)
    return o, state


def _token(state: State, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None) -> tuple[Tensor, State]:
    s = state[0] if decay is None else state[0] * decay.exp().unsqueeze(-1)
    q, k, v = q.unsqueeze(-2), k.unsqueeze(-2), v.unsqueeze(-2)
    s = s + k.mT @ (beta[..., None, None] * (v - k @ s))
    return (q @ s).squeeze(-2), (s,)
