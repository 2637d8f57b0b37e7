"""The delta rule in chunks (WY form): parallel inside a chunk, a short recurrence from chunk to chunk.

Inside a chunk, with b the running sum of its log decays, the written values u_i solve a unit lower triangular system,
    u_i + sum over j < i of beta_i exp(b_i - b_j) (k_i . k_j) u_j = beta_i (v_i - exp(b_i) k_i S_0)
so u = U - W S_0 with U and W free of the state. Then
    o_i = exp(b_i) q_i S_0 + sum over j <= i of exp(b_i - b_j) (q_i . k_j) u_j
    S_C = (Diag(exp b_C) - Ke^T W) S_0 + Ke^T U,   Ke_j = exp(b_C - b_j) k_j

Shapes: B batch, T tokens, C tokens of a chunk, M chunks, N sequences, H key heads, Hv value heads, K and V head widths;
chunked arrays are [M, B, Hv, C, K or V], states [M, B, Hv, K, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.carry import carry
from zoo.kernels.decays import Decay
from zoo.kernels.delta_rule.reference import prepare
from zoo.kernels.packed import per_token
from zoo.kernels.products import low_precision, product
from zoo.kernels.triangular import unit_lower_inverse


def supports(*args: object) -> str | None:
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    qk_l2norm: bool,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dtype, low = q.dtype, low_precision(q)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = prepare(q, k, v, qk_l2norm, scale)
        plan = ch.layout(q.shape[1], cu_seqlens)
        inside = ch.inside(plan, per_token(decay, v), low)
        parts = plan.split(q), plan.split(k), plan.split(v), plan.split(beta).unsqueeze(-1)
        o, state = _chunks(*parts, inside, plan, initial_state)
        return plan.join(o).to(dtype), state if output_final_state else None


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Decay, plan: ch.Chunks, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    low, widths = decay.low, [v.shape[-1], k.shape[-1]]
    inverse = unit_lower_inverse(beta * decay.scores(k, k, diagonal=False))
    # What enters the state is never rounded to `low`: those errors would add up from chunk to chunk.
    writes = inverse @ (beta * torch.cat([v, decay.from_start(k)], -1))  # [M, B, Hv, C, V + K], U and W
    update, erase = (decay.to_end(k).mT @ writes).split(widths, -1)
    eye, keep = torch.eye(widths[1], dtype=k.dtype, device=k.device), decay.total()
    transition = (eye if keep is None else eye * keep) - erase
    entering, final = carry(plan, transition, update, initial_state, matrix=True)
    u, w = writes.split(widths, -1)
    u = u - product(w, entering, low)
    return product(decay.from_start(q), entering, low) + product(decay.scores(q, k), u, low), final
