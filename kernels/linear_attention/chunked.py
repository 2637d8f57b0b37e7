"""Linear attention in chunks: parallel inside a chunk, a short recurrence from chunk to chunk.

Inside a chunk, with b the running sum of its log decays,
    o_i = exp(b_i) q_i S_0 + sum over j <= i of exp(b_i - b_j) (q_i . k_j) v_j
    S_C = exp(b_C) S_0 + sum over j of exp(b_C - b_j) k_j^T v_j

Arrays of M chunks of C tokens are [M, B, Hv, C, K or V], states [M, B, Hv, K, V].
"""

from typing import Any

from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.decays import ChannelDecay
from zoo.kernels.linear_attention.reference import finish, per_head, prepare
from zoo.kernels.packed import low_precision, per_token, product
from zoo.kernels.sequential import carry


def run(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, decay, value_decay, bonus, normalize, scale, initial_state, _, cu_seqlens = args
    low, bonus = low_precision(q), per_head(bonus)
    early = bonus is not None  # with a bonus, the state before the token's own decay is read
    q, k, v, value_decay = prepare(q, k, v, value_decay, normalize, scale)
    plan = ch.layout(q.shape[1], cu_seqlens)
    on_keys = ch.inside(plan, per_token(decay, v), low)
    on_values = None if value_decay is None else ChannelDecay(plan.split(value_decay), low)
    q, k, v = plan.split(q), plan.split(k), plan.split(v)
    update = product(on_keys.to_end(k).mT, v if on_values is None else on_values.to_end(v), low)
    keep = on_keys.total()
    if on_values is not None:
        total = on_values.total().mT
        keep = total if keep is None else keep * total
    entering, final = carry(plan, keep, update, initial_state)
    o = product(on_keys.from_start(q, exclusive=early), entering, low)
    scores = on_keys.scores(q, k, exclusive=early, diagonal=not early)
    if on_values is None:
        o = o + product(scores, v, low)
    else:
        o = on_values.from_start(o, exclusive=early) + on_values.values(scores, v, exclusive=early)
    if bonus is not None:
        o = o + (q * bonus.mT * k).sum(-1, keepdim=True) * v
    return finish(plan.join(o), normalize), final
