"""The delta rule in chunks (WY form): parallel inside a chunk, a short recurrence from chunk to chunk.

Inside a chunk, with b the running sum of its log decays, the written values u_i solve a unit lower triangular system,
    u_i + sum over j < i of beta_i exp(b_i - b_j) (k_i . k_j) u_j = beta_i (v_i - exp(b_i) k_i S_0)
so u = U - W S_0 with U and W free of the state. Then
    o_i = exp(b_i) q_i S_0 + sum over j <= i of exp(b_i - b_j) (q_i . k_j) u_j
    S_C = (Diag(exp b_C) - Ke^T W) S_0 + Ke^T U,   Ke_j = exp(b_C - b_j) k_j

Arrays of M chunks of C tokens are [M, B, Hv, C, K or V], states [M, B, Hv, K, V].
"""

from typing import Any

import torch
from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.halves import unit_lower_inverse
from zoo.kernels.packed import low_precision, per_token, prepare, product
from zoo.kernels.sequential import carry


def run(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, beta, decay, qk_l2norm, scale, initial_state, _, cu_seqlens = args
    low, widths = low_precision(q), [v.shape[-1], q.shape[-1]]
    q, k, v = prepare(q, k, v, scale=scale, norm=qk_l2norm)
    plan = ch.layout(q.shape[1], cu_seqlens)
    inside = ch.inside(plan, per_token(decay, v), low)
    q, k, v, beta = plan.split(q), plan.split(k), plan.split(v), plan.split(beta).unsqueeze(-1)
    inverse = unit_lower_inverse(beta * inside.scores(k, k, diagonal=False))
    # What enters the state is never rounded to `low`: those errors would add up from chunk to chunk.
    writes = inverse @ (beta * torch.cat([v, inside.from_start(k)], -1))  # [M, B, Hv, C, V + K], U and W
    update, erase = (inside.to_end(k).mT @ writes).split(widths, -1)
    entering, final = carry(plan, ch.transition(k, inside, -erase), update, initial_state, matrix=True)
    u, w = writes.split(widths, -1)
    u = u - product(w, entering, low)
    o = product(inside.from_start(q), entering, low) + product(inside.scores(q, k), u, low)
    return plan.join(o), final
