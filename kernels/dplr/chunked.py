"""Diagonal-plus-low-rank transitions in chunks: parallel inside a chunk, a short recurrence from chunk to chunk.

Inside a chunk, with c the running sum of its log decays, what is read, u_i = a_i S_{i-1}, solves a unit lower
triangular system: the state before token i has the decays of the tokens before it alone,
    u_i - sum over j < i of (a_i exp(c_{i-1} - c_j) . b_j) u_j
        = exp(c_{i-1}) a_i S_0 + sum over j < i of (a_i exp(c_{i-1} - c_j) . k_j) v_j
so u = U + W S_0 with U and W free of the state. Then
    o_i = exp(c_i) q_i S_0 + sum over j <= i of exp(c_i - c_j) ((q_i . k_j) v_j + (q_i . b_j) u_j)
    S_C = (Diag(exp c_C) + Be^T W) S_0 + Ke^T V + Be^T U,   Xe_j = exp(c_C - c_j) x_j

Shapes: B batch, T tokens, C tokens of a chunk, M chunks, N sequences, H key heads, Hv value heads, K and V head widths;
chunked arrays are [M, B, Hv, C, K or V], states [M, B, Hv, K, V].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.carry import carry
from zoo.kernels.decays import Decay
from zoo.kernels.dplr.reference import prepare
from zoo.kernels.packed import per_token
from zoo.kernels.products import low_precision, product
from zoo.kernels.triangular import unit_lower_inverse


def supports(*args: object) -> str | None:
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dtype, low = q.dtype, low_precision(q)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, a, b = prepare(q, k, v, a, b, scale)
        plan = ch.layout(q.shape[1], cu_seqlens)
        inside = ch.inside(plan, per_token(decay, v), low)
        q, k, v, a, b = (plan.split(x) for x in (q, k, v, a, b))
        o, state = _chunks(q, k, v, a, b, inside, plan, initial_state)
        return plan.join(o).to(dtype), state if output_final_state else None


def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Decay,
    plan: ch.Chunks,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    low, widths = decay.low, [v.shape[-1], k.shape[-1]]
    (q_k, q_b), (a_k, a_b) = decay.cross((q, _earlier(a)), (k, b))
    a_k, a_b = _later(a_k), _later(a_b)
    # What enters the state is never rounded to `low`: those errors would add up from chunk to chunk.
    reads = unit_lower_inverse(-a_b) @ torch.cat([a_k @ v, decay.from_start(a, exclusive=True)], -1)  # U and W
    k_end, b_end = decay.to_end(torch.stack([k, b])).mT.unbind(0)
    written, fed_back = (b_end @ reads).split(widths, -1)
    eye, keep = torch.eye(widths[1], dtype=k.dtype, device=k.device), decay.total()
    transition = (eye if keep is None else eye * keep) + fed_back
    entering, final = carry(plan, transition, k_end @ v + written, initial_state, matrix=True)
    u, w = reads.split(widths, -1)
    u = u + product(w, entering, low)
    o = product(decay.from_start(q), entering, low)
    return o + product(q_k, v, low) + product(q_b, u, low), final


def _earlier(a: Tensor) -> Tensor:
    """Every row one token earlier: a token's a meets the decays up to the token before it, so moved there it shares the
    decays of that token's q (and the first row of a chunk meets none)."""
    return F.pad(a[..., 1:, :], [0, 0, 0, 1])


def _later(scores: Tensor) -> Tensor:
    """The way back: every row one token later."""
    return F.pad(scores[..., :-1, :], [0, 0, 1, 0])
