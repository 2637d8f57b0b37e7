"""Exponentially weighted averages from elementwise scans: one for the maxima, then one for each sum.

Shapes: B batch, T tokens, N sequences, D channels; the state (numerator, denominator, maximum) is three times [N, D].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.sequential import State
from zoo.kernels.weighted_average.reference import EMPTY, add, prepare, ratio


def average(scan: Callable[..., tuple[Tensor, Tensor]], args: Any) -> tuple[Tensor, State]:
    """The op by `scan(x, decay, state, maximum, cu_seqlens)`: h_t = exp(decay_t) h_{t-1} + x_t, or with `maximum` and
    no gradient h_t = max(h_{t-1} + decay_t, x_t), and the final state. Averages do not depend on the maxima, so these
    count as constants; only the final one has a gradient."""
    k, v, decay, bonus, initial_state, output_final_state, cu_seqlens = args
    k, v, decay, (a, b, m) = prepare(k, v, decay, initial_state, cu_seqlens)
    top, last = scan(k.detach(), decay.detach(), m.detach(), True, cu_seqlens)
    before = _before(top, m.detach(), cu_seqlens)
    keep, new, scale = decay + (before - top), (k - top).exp(), (m - m.detach()).exp()
    begin = [a * scale, b * scale]
    found = [scan(x, keep, y, False, cu_seqlens) for x, y in zip((new * v, new), begin, strict=True)]
    (a, b), final = (x for x, _ in found), [x for _, x in found]
    if bonus is not None:
        a, b = (_before(x, y, cu_seqlens) for x, y in zip((a, b), begin, strict=True))
        a, b, _ = add(a, b, before, k + bonus, v)
    if output_final_state and torch.is_grad_enabled():
        # Zeros with the gradient of the final maximum: it is passed on by the larger, halved by equal ones.
        k = k.clamp(min=EMPTY)
        share = ((k - before - decay).detach().sign() + 1) / 2
        changes = share * (k - k.detach()) + (1 - share) * (decay - decay.detach())
        _, drift = scan(changes, (1 - share).log(), m - m.detach(), False, cu_seqlens)
        final, last = [x * (-drift).exp() for x in final], last + drift
    return ratio(a, b), (final[0], final[1], last)


def _before(x: Tensor, begin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What x [B, T, D] was one token before; `begin` [N, D] before the first."""
    if cu_seqlens is None:
        return torch.cat([begin.unsqueeze(1), x[:, :-1]], 1)
    row = torch.arange(x.shape[1], device=x.device)
    owner = torch.searchsorted(cu_seqlens[1:].long(), row, right=True)
    source = torch.where(row == cu_seqlens[owner], x.shape[1] + owner, row - 1)
    return torch.cat([x[0], begin])[source].unsqueeze(0)
