"""Test-time training in its dual form: all tokens of a mini-batch at once, one mini-batch after the other.

Shapes: B batch, T tokens, C tokens of a mini-batch, M mini-batches, N sequences, Hv value heads; chunked arrays are
[M, B, Hv, C, ...], weights [B, Hv, ...].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.checks import count_sequences
from zoo.kernels.sequential import State, each_chunk
from zoo.kernels.test_time_training.dual import advance
from zoo.kernels.test_time_training.layout import layout, next_offset, places
from zoo.kernels.test_time_training.reference import prepare
from zoo.kernels.test_time_training.states import OFFSET, WEIGHTS, names, test_time_training_state


def supports(*args: object) -> str | None:
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: Mapping[str, Tensor],
    inner: str,
    norm: Any,
    momentum: Tensor | None,
    decay: Tensor | None,
    position_scale: Tensor | None,
    mini_batch: int,
    initial_state: Mapping[str, Tensor] | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    dtype, has = q.dtype, (momentum is not None, decay is not None)
    begin = initial_state
    if begin is None:
        n = count_sequences(q, cu_seqlens)
        begin = test_time_training_state(weights, n, inner=inner, momentum=has[0], decay=has[1])
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = prepare(q, k, v)
        offset = None if initial_state is None else initial_state[OFFSET]
        plan = layout(q.shape[1], mini_batch, cu_seqlens, offset)
        parts = [None if x is None else plan.split(x) for x in (q, k, v, lr, momentum, decay)]
        keys, count = names(inner, *has), len(WEIGHTS[inner])
        start: State = tuple(begin[key] for key in keys)
        if plan.slots is None:  # every mini-batch begins afresh
            start = (*start[:count], *[None] * (len(start) - count))
        rows = None if position_scale is None else position_scale[..., : plan.size, None]
        last_row = None if position_scale is None else position_scale[..., -1].reshape(1, -1)
        step = partial(advance, count, norm, rows, last_row)
        o, state = each_chunk(plan, step, start, [*parts, *places(plan, mini_batch, lr)])
        o = plan.join(o).to(dtype)
        if not output_final_state:
            return o, None
        ended = {key: begin[key] if x is None else x for key, x in zip(keys, state, strict=True)}
        return o, ended | {OFFSET: next_offset(q.shape[1], mini_batch, cu_seqlens, begin[OFFSET])}
