"""Helpers of the token loops and the chunked forms: head groups, decay forms and packed sequences.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoo.kernels.checks import host_values


def heads(x: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, K] to [B, T, Hv, K]: value head j uses key head j // (Hv // H)."""
    groups = v.shape[2] // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, 2)


def per_token(decay: Tensor | None, v: Tensor) -> Tensor | None:
    """Any form of decay as [B, T, Hv, 1] or [B, T, Hv, K]."""
    if decay is None:
        return None
    if decay.dim() == 3:
        return decay.unsqueeze(-1)
    return decay if decay.dim() == 4 else decay.reshape(decay.shape[0], -1).expand(*v.shape[:2], -1, -1)


def each_sequence(
    run: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor | None],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`run(state, *inputs)` over the batch, or over the packed sequences in turn (reading cu_seqlens on the host)."""
    if cu_seqlens is None:
        return run(state, *inputs)
    ends = host_values(cu_seqlens)
    outputs, states = [], []
    for n, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        part = [None if x is None else x[:, begin:end] for x in inputs]
        o, final = run(None if state is None else state[n : n + 1], *part)
        outputs.append(o)
        states.append(final)
    return torch.cat(outputs, 1), torch.cat(states)


def l2norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
