"""Diagonal-plus-low-rank transitions in chunks: parallel inside a chunk, a short recurrence from chunk to chunk.

Inside a chunk, with c the running sum of its log decays, what is read, u_i = a_i S_{i-1}, solves a unit lower
triangular system: the state before token i has the decays of the tokens before it alone,
    u_i - sum over j < i of (a_i exp(c_{i-1} - c_j) . b_j) u_j
        = exp(c_{i-1}) a_i S_0 + sum over j < i of (a_i exp(c_{i-1} - c_j) . k_j) v_j
so u = U + W S_0 with U and W free of the state. Then
    o_i = exp(c_i) q_i S_0 + sum over j <= i of exp(c_i - c_j) ((q_i . k_j) v_j + (q_i . b_j) u_j)
    S_C = (Diag(exp c_C) + Be^T W) S_0 + Ke^T V + Be^T U,   Xe_j = exp(c_C - c_j) x_j

Arrays of M chunks of C tokens are [M, B, Hv, C, K or V], states [M, B, Hv, K, V].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.halves import unit_lower_inverse
from zoo.kernels.packed import low_precision, per_token, prepare, product
from zoo.kernels.sequential import carry


def run(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, a, b, decay, scale, initial_state, _, cu_seqlens = args
    low, widths = low_precision(q), [v.shape[-1], q.shape[-1]]
    q, k, v, a, b = prepare(q, k, v, a, b, scale=scale)
    plan = ch.layout(q.shape[1], cu_seqlens)
    inside = ch.inside(plan, per_token(decay, v), low)
    q, k, v, a, b = (plan.split(x) for x in (q, k, v, a, b))
    # A token's a meets the decays up to the token before it. Moved there it shares the decays of that token's q, and
    # the first row of a chunk meets none; the scores move back.
    earlier = F.pad(a[..., 1:, :], [0, 0, 0, 1])
    (q_k, q_b), moved = inside.cross((q, earlier), (k, b))
    a_k, a_b = (F.pad(x[..., :-1, :], [0, 0, 1, 0]) for x in moved)
    # What enters the state is never rounded to `low`: those errors would add up from chunk to chunk.
    reads = unit_lower_inverse(-a_b) @ torch.cat([a_k @ v, inside.from_start(a, exclusive=True)], -1)  # U and W
    k_end, b_end = inside.to_end(torch.stack([k, b])).mT.unbind(0)
    written, fed_back = (b_end @ reads).split(widths, -1)
    transition = ch.transition(k, inside, fed_back)
    entering, final = carry(plan, transition, k_end @ v + written, initial_state, matrix=True)
    u, w = reads.split(widths, -1)
    u = u + product(w, entering, low)
    o = product(inside.from_start(q), entering, low)
    return plan.join(o + product(q_k, v, low) + product(q_b, u, low)), final
