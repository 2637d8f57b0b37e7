"""Linear attention in chunks: parallel inside a chunk, a short recurrence from chunk to chunk.

Inside a chunk, with b the running sum of its log decays,
    o_i = exp(b_i) q_i S_0 + sum over j <= i of exp(b_i - b_j) (q_i . k_j) v_j
    S_C = exp(b_C) S_0 + sum over j of exp(b_C - b_j) k_j^T v_j

Shapes: B batch, T tokens, C tokens of a chunk, M chunks, N sequences, H key heads, Hv value heads, K and V head widths;
chunked arrays are [M, B, Hv, C, K or V], states [M, B, Hv, K, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.carry import carry
from zoo.kernels.decays import ChannelDecay, Decay
from zoo.kernels.linear_attention.reference import finish, per_head, prepare
from zoo.kernels.packed import per_token
from zoo.kernels.products import low_precision, product


def supports(*args: object) -> str | None:
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
    bonus: Tensor | None,
    normalize: str | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dtype, low = q.dtype, low_precision(q)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, value_decay, scale = prepare(q, k, v, value_decay, normalize, scale)
        plan = ch.layout(q.shape[1], cu_seqlens)
        on_keys = ch.inside(plan, per_token(decay, v), low)
        on_values = None if value_decay is None else ChannelDecay(plan.split(value_decay), low)
        parts = plan.split(q * scale), plan.split(k), plan.split(v)
        o, state = _chunks(*parts, on_keys, on_values, per_head(bonus), plan, initial_state)
        return finish(plan.join(o), normalize).to(dtype), state if output_final_state else None


def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    value_decay: ChannelDecay | None,
    bonus: Tensor | None,
    plan: ch.Chunks,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    low, early = decay.low, bonus is not None  # with a bonus, the state before the token's own decay is read
    v_end = v if value_decay is None else value_decay.to_end(v)
    update = product(decay.to_end(k).mT, v_end, low)
    keep = decay.total()
    if value_decay is not None:
        total = value_decay.total().mT
        keep = total if keep is None else keep * total
    entering, final = carry(plan, keep, update, initial_state)
    o = product(decay.from_start(q, exclusive=early), entering, low)
    if value_decay is not None:
        o = value_decay.from_start(o, exclusive=early)
    scores = decay.scores(q, k, exclusive=early, diagonal=not early)
    o = o + (product(scores, v, low) if value_decay is None else value_decay.values(scores, v, exclusive=early))
    if bonus is not None:
        o = o + (q * bonus.mT * k).sum(-1, keepdim=True) * v
    return o, final
