"""Diagonal state spaces, one chunk after the other, with a scan inside each.

Only a chunk is ever expanded to [B, C, D, n]; the backward pass keeps the state that enters each and expands it again.

Shapes: B batch, T tokens, C tokens of a chunk, M chunks, N sequences, D channels, n states per channel, G groups of
channels; chunked arrays are [M, B, C, ...], states [B, D, n].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.kernels import chunks as ch
from zoo.kernels.prefix import decayed_sum
from zoo.kernels.selective_scan.reference import per_channel, prepare, skip, split_fixed, transition
from zoo.kernels.sequential import State, each_chunk

CHUNK = 32


def supports(*args: object) -> str | None:
    return None


def run(
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        x, b, c, begin = prepare(x, a, b, c, initial_state, cu_seqlens)
        plan = ch.layout(x.shape[1], cu_seqlens, CHUNK)
        tokens, fixed = split_fixed(b, c)
        parts = [None if y is None else plan.split(y.unsqueeze(2)).squeeze(2) for y in (x, dt, *tokens)]

        def step(state: State, *part: Tensor | None) -> tuple[Tensor, State]:
            y, last = checkpoint(_chunk, *state, a, *fixed, *part, use_reentrant=False, preserve_rng_state=False)
            return y, (last,)

        y, (state,) = each_chunk(plan, step, (begin,), parts)
        y = plan.join(y.unsqueeze(2)).squeeze(2)
        return skip(y, x, d).to(dtype), state if output_final_state else None


def _chunk(
    state: Tensor,
    a: Tensor | None,
    b_fixed: Tensor | None,
    c_fixed: Tensor | None,
    x: Tensor,
    dt: Tensor,
    b: Tensor | None,
    c: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, C, D] and the state after the chunk; places without a token have dt = 0 and change nothing."""
    b = b_fixed if b is None else per_channel(b, x)
    c = c_fixed if c is None else per_channel(c, x)
    assert b is not None and c is not None
    keep, write = transition(x, dt, a, b)
    begin = write[:, :1] + keep[:, :1] * state.unsqueeze(1)
    states = decayed_sum(keep, torch.cat([begin, write[:, 1:]], 1), 1)
    return _read(states, c), states[:, -1]


def _read(states: Tensor, c: Tensor) -> Tensor:
    if c.dim() == 4 and c.shape[2] == 1 and c.dtype == states.dtype:
        return (states @ c.mT).squeeze(-1).real
    return (states * c).sum(-1).real
