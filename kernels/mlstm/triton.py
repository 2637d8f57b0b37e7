"""The matrix LSTM on the Triton kernels of linear attention: under its running maximum m it is linear attention with
    log decay = log f_t + m_{t-1} - m_t <= 0,    log gain = i_t - m_t <= 0 on what token t writes.
h does not depend on m but for the 1e-6. So gates take m as a number, and its own gradient is that of a factor on what
is read: what nearly cancels is never summed over tokens.

Shapes: B batch, T tokens, N sequences, Hv value heads; gates and m [B, T, Hv], in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import count_sequences
from zoo.kernels.linear_attention import triton
from zoo.kernels.mlstm.reference import EPSILON, State, joined, separate


def supports(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str | None:
    return triton.supports(q, k, v, None, None, None, None)


def run(*args: Any) -> tuple[Tensor, State]:
    q, k, v, input_gate, forget_gate, scale, initial_state, _, cu_seqlens = args
    state, start = joined(initial_state, q, v, count_sequences(q, cu_seqlens))
    write, forget = input_gate.double(), F.logsigmoid(forget_gate).double()
    t, place = q.shape[1], torch.arange(q.shape[1], device=q.device)
    begin = start.double().unsqueeze(1)  # m before each token's sequence, [B, 1 or T, Hv]
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:], place, right=True)
        place, begin = place - cu_seqlens[sequence], start.double()[sequence].unsqueeze(0)
    maxima = _maxima(write, forget, begin, place)
    fixed = maxima.detach()
    before = torch.where(place.view(1, t, 1) == 0, begin.detach(), F.pad(fixed, [0, 0, 1, 0])[:, :t])
    decay, gain = (forget + (before - fixed)).float(), (write - fixed).float()
    state = state * (start - start.detach()).exp()[..., None, None]
    read, normal, final, _ = triton.OP(q, k, v, decay, gain, True, scale, state, cu_seqlens, True)
    factor = (fixed - maxima).exp().float()
    floor = (-maxima).clamp(max=80.0).exp().float()  # exp would overflow beyond; h is zero there anyway
    h = read * (factor / (torch.maximum((factor * normal).abs(), floor) + EPSILON)).unsqueeze(-1)
    m = maxima[:, -1] if cu_seqlens is None else _last(maxima, start.double(), cu_seqlens)
    return h, separate(final * (m.detach() - m).exp().float()[..., None, None], m.float())


def _maxima(write: Tensor, forget: Tensor, begin: Tensor, place: Tensor) -> Tensor:
    """m_t = max(log f_t + m_{t-1}, i_t), looking back 1, 2, 4, .. tokens but never before `place` 0: no scattered sum,
    whose order would vary, in its gradient."""
    peak, sums, step = write, forget, 1
    while step < place.shape[0]:
        first = (place < step).view(1, -1, 1)
        earlier = F.pad(peak[:, :-step], [0, 0, step, 0]).masked_fill(first, -torch.inf)
        peak = torch.maximum(peak, earlier + sums)
        sums = sums + F.pad(sums[:, :-step], [0, 0, step, 0]).masked_fill(first, 0.0)
        step *= 2
    return torch.maximum(begin + sums, peak)


def _last(maxima: Tensor, start: Tensor, cu_seqlens: Tensor) -> Tensor:
    """m after each packed sequence; an empty one leaves it as it was."""
    begins, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if not maxima.shape[1]:
        return start
    return torch.where((ends > begins).unsqueeze(1), maxima[0].index_select(0, (ends - 1).clamp(min=0)), start)
