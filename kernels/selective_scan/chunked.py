"""Diagonal state spaces, one chunk after the other, with a scan inside each.

Only a chunk is ever expanded to [B, C, D, n]; the backward pass keeps the state that enters each and expands it again.

Arrays of M chunks of C tokens are [M, B, C, ...], states [B, D, n].
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.kernels import chunks as ch
from zoo.kernels.halves import decayed_sum
from zoo.kernels.selective_scan.reference import per_channel, prepare, transition
from zoo.kernels.sequential import each_chunk

CHUNK = 32


def run(*args: Any) -> tuple[Tensor, Tensor]:
    x, dt, a, b, c, d, initial_state, _, cu_seqlens = args
    x, b, c, begin = prepare(x, a, b, c, initial_state, cu_seqlens)
    plan = ch.layout(x.shape[1], cu_seqlens, CHUNK)
    tokens = [y if y.dim() == 4 else None for y in (b, c)]
    parts = [None if y is None else plan.split(y.unsqueeze(2)).squeeze(2) for y in (x, dt, *tokens)]

    def step(state: Any, *part: Any) -> Any:  # Dynamo reads the annotations and knows no subscripts
        inputs = (own if y is None else y for own, y in zip((x, dt, b, c), part, strict=True))
        y, last = checkpoint(_chunk, a, *state, *inputs, use_reentrant=False, preserve_rng_state=False)
        return y, (last,)

    y, (state,) = each_chunk(plan, step, (begin,), parts)
    y = plan.join(y.unsqueeze(2)).squeeze(2)
    return y if d is None else y + d * x, state


def _chunk(a: Tensor | None, state: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, C, D] and the state after the chunk; places without a token have dt = 0 and change nothing."""
    b, c = (y if y.dim() == 2 else per_channel(y, x) for y in (b, c))
    keep, write = transition(x, dt, a, b)
    begin = write[:, :1] + keep[:, :1] * state.unsqueeze(1)
    states = decayed_sum(keep, torch.cat([begin, write[:, 1:]], 1), 1)
    if c.dim() == 4 and c.shape[2] == 1 and c.dtype == states.dtype:
        y = (states @ c.mT).squeeze(-1)
    else:
        y = (states * c).sum(-1)
    return y.real, states[:, -1]
