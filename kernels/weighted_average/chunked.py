"""Exponentially weighted averages, one chunk after the other: a scan for the maxima, then one for the sums.

Arrays of M chunks of C tokens are [M, B, C, D], the state (numerator, denominator, maximum) is three times [B, D].
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.halves import decayed_max, decayed_sum
from zoo.kernels.sequential import State, each_chunk
from zoo.kernels.weighted_average.reference import add, prepare, ratio


def run(*args: Any) -> tuple[Tensor, State]:
    k, v, decay, bonus, initial_state, _, cu_seqlens = args
    k, v, decay, begin = prepare(k, v, decay, initial_state, cu_seqlens)
    plan = ch.layout(k.shape[1], cu_seqlens)
    fills = (k, -torch.inf), (v, 0.0), (decay, 0.0)  # no weight where no token is
    parts = [plan.split(x.unsqueeze(2), fill).squeeze(2) for x, fill in fills]
    o, state = each_chunk(plan, partial(_chunk, bonus), begin, parts)
    return plan.join(o.unsqueeze(2)).squeeze(2), state


def _chunk(bonus: Tensor | None, state: State, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, State]:
    numerator, denominator, maximum = (x.unsqueeze(1) for x in state)
    top = torch.maximum(maximum + decay[:, :1], k[:, :1])
    tops = decayed_max(decay, torch.cat([top, k[:, 1:]], 1), 1)
    before = torch.cat([maximum, tops[:, :-1]], 1)
    keep, new = (before + decay - tops).exp(), (k - tops).exp()
    numerators, denominators = (_scan(keep, *x) for x in ((numerator, new * v), (denominator, new)))
    state = numerators[:, -1], denominators[:, -1], tops[:, -1]
    if bonus is None:
        return ratio(numerators, denominators), state
    numerators, denominators = torch.cat([numerator, numerators], 1), torch.cat([denominator, denominators], 1)
    read = add(numerators[:, :-1], denominators[:, :-1], before, k + bonus, v)
    return ratio(read[0], read[1]), state


def _scan(keep: Tensor, begin: Tensor, x: Tensor) -> Tensor:
    """The decayed sums [B, C, D] that start from `begin` [B, 1, D]."""
    first = x[:, :1] + keep[:, :1] * begin
    return decayed_sum(keep, torch.cat([first, x[:, 1:]], 1), 1)
