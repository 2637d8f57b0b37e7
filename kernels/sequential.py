"""Recurrences: one token after the other, or one chunk after the other.

Shapes: B batch, T tokens, M chunks, N sequences (B, or the packed ones), Hv heads, K and V head widths; tensors of a
state are [B, ...] or [N, ...], those of `carry` are [M, B, Hv, K, V].
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.checks import count_sequences, host_values
from zoo.kernels.chunks import Chunks

State = tuple[Any, ...]
Run = Callable[..., tuple[Tensor, State]]


def each_token(
    run: Run, like: Tensor, inputs: Sequence[Tensor | None], initial: State, cu_seqlens: Tensor | None
) -> tuple[Tensor, State]:
    """`run(state, *inputs of this token) -> (output, state)` over the T tokens of the batch, or of the packed sequences
    in turn (reading cu_seqlens on the host). The outputs [B, T, ...] look like `like`."""
    if cu_seqlens is None and like.shape[1] == 1:  # a step: nothing to put together
        o, state = run(initial, *(None if x is None else x[:, 0] for x in inputs))
        return o.unsqueeze(1), state
    ends = [0, like.shape[1]] if cu_seqlens is None else host_values(cu_seqlens)
    split = [None if x is None else x.unbind(1) for x in inputs]
    outputs, states = [like[:, :0]], []
    for n, (begin, end) in enumerate(pairwise(ends)):
        state = initial if cu_seqlens is None else tuple(x[n : n + 1] for x in initial)
        for t in range(begin, end):
            o, state = run(state, *(None if x is None else x[t] for x in split))
            outputs.append(o.unsqueeze(1))
        states.append(state)
    return torch.cat(outputs, 1), tuple(torch.cat(x) for x in zip(*states, strict=True))


def zeros(state: Tensor | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The state [N, Hv, K, V] that sequences begin with."""
    n = count_sequences(q, cu_seqlens)
    return q.new_zeros(n, v.shape[2], q.shape[3], v.shape[3]) if state is None else state


def each_chunk(chunks: Chunks, run: Run, initial: State, parts: Sequence[Any]) -> tuple[Tensor, State]:
    """`run(state, *part of this chunk) -> (output, state)` over the M chunks, with restarts at packed sequences: the
    stacked outputs and the final states. `initial` holds N states; each of `parts` has M parts, or is None."""
    state = initial if chunks.sequence is None else tuple(x[:1] for x in initial)
    # Slices would fill gradients with zeros.
    split = [x.unbind(0) if isinstance(x, Tensor) else x for x in parts]
    outputs, states = [], []
    for m in range(chunks.count):
        if chunks.sequence is not None:
            begins = (x.index_select(0, chunks.sequence[m : m + 1]) for x in initial)
            state = tuple(torch.where(chunks.first[m], x, s) for s, x in zip(state, begins, strict=True))
        o, state = run(state, *(None if x is None else x[m] for x in split))
        outputs.append(o)
        states.append(state)
    if chunks.sequence is not None:
        ends = zip(zip(*states, strict=True), initial, strict=True)
        state = tuple(chunks.finals(torch.cat(after), before) for after, before in ends)
    return torch.stack(outputs), state


def carry(
    chunks: Chunks, keep: Tensor | None, update: Tensor, initial_state: Tensor | None, *, matrix: bool = False
) -> tuple[Tensor, Tensor]:
    """S = keep * S + update from chunk to chunk, or with `matrix` S = keep @ S + update, where keep is [M, B, Hv, K, K]
    (else it broadcasts): the states that enter each chunk, and the final state of each sequence [N, Hv, K, V]."""
    zero = torch.zeros_like(update[0])
    initial = zero if initial_state is None else initial_state
    if chunks.sequence is None:
        entering, after = _Carry.apply(keep, update, initial, None, None, matrix)
        return entering, after[-1]
    begin = None if initial_state is None else initial_state.index_select(0, chunks.sequence).unsqueeze(1)
    entering, after = _Carry.apply(keep, update, zero, begin, chunks.first, matrix)
    return entering, chunks.finals(after[:, 0], initial)


class _Carry(torch.autograd.Function):
    """A loop of one product per chunk, forward and backward; the gradient of all `keep` is one batched product."""

    @staticmethod
    def forward(
        keep: Tensor | None, update: Tensor, state: Tensor, begin: Tensor | None, first: Tensor | None, matrix: bool
    ) -> tuple[Tensor, Tensor]:
        entering, after = [], []
        for m in range(update.shape[0]):
            if first is not None:
                state = torch.where(first[m], torch.zeros_like(state) if begin is None else begin[m], state)
            entering.append(state)
            state = _advance(None if keep is None else keep[m], state, update[m], matrix)
            after.append(state)
        return torch.stack(entering), torch.stack(after if first is not None else after[-1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        keep, _, _, begin, first, matrix = inputs
        ctx.save_for_backward(keep, first, output[0])
        ctx.matrix, ctx.restarts = matrix, begin is not None

    @staticmethod
    def backward(ctx: Any, d_entering: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        keep, first, entering = ctx.saved_tensors
        back = keep.mT if ctx.matrix else keep
        count, carried = entering.shape[0], d_after[-1]
        updates, begins = [], []
        for m in range(count - 1, -1, -1):
            if first is not None and m < count - 1:
                carried = carried + d_after[m]
            updates.append(carried)
            carried = _advance(None if back is None else back[m], carried, d_entering[m], ctx.matrix)
            if first is not None:
                begins.append(torch.where(first[m], carried, 0.0))
                carried = torch.where(first[m], 0.0, carried)
        d_update = torch.stack(updates[::-1])
        d_begin = torch.stack(begins[::-1]) if ctx.restarts else None
        d_keep = None
        if keep is not None:
            d_keep = d_update @ entering.mT if ctx.matrix else (d_update * entering).sum_to_size(keep.shape)
        return d_keep, d_update, carried, d_begin, None, None


def _advance(keep: Tensor | None, state: Tensor, update: Tensor, matrix: bool) -> Tensor:
    if keep is None:
        return update + state
    if not matrix:
        return torch.addcmul(update, keep, state)
    return torch.baddbmm(update.flatten(0, 1), keep.flatten(0, 1), state.flatten(0, 1)).view_as(update)
