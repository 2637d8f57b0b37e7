"""The recurrence from chunk to chunk: S = keep * S + update or S = keep @ S + update, with restarts.

Shapes: M chunks, B batch, H heads, K and V head widths; states and `update` are [M, B, H, K, V], `keep` is
[M, B, H, K, K] (matrix) or broadcasts against the state (elementwise).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.chunks import Chunks


def carry(
    chunks: Chunks, keep: Tensor | None, update: Tensor, initial_state: Tensor | None, *, matrix: bool = False
) -> tuple[Tensor, Tensor]:
    """The states that enter each chunk [M, B, H, K, V], and the final state of each sequence [N, H, K, V]."""
    zero = torch.zeros_like(update[0])
    if chunks.sequence is None or chunks.first is None:
        entering, after = _Carry.apply(
            keep, update, zero if initial_state is None else initial_state, None, None, matrix
        )
        return entering, after[-1]
    begin = None if initial_state is None else initial_state.index_select(0, chunks.sequence).unsqueeze(1)
    entering, after = _Carry.apply(keep, update, zero, begin, chunks.first, matrix)
    return entering, _finals(chunks, after, initial_state)


def _finals(chunks: Chunks, after: Tensor, initial_state: Tensor | None) -> Tensor:
    """After the last chunk of each packed sequence; an empty one leaves its initial state as it was."""
    assert chunks.last is not None and chunks.empty is not None
    state = after[:, 0].index_select(0, chunks.last)
    before = torch.zeros_like(state) if initial_state is None else initial_state
    return torch.where(chunks.empty[:, None, None, None], before, state)


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
        return _keep_grad(keep, d_update, entering, ctx.matrix), d_update, carried, d_begin, None, None


def _advance(keep: Tensor | None, state: Tensor, update: Tensor, matrix: bool) -> Tensor:
    if keep is None:
        return update + state
    if not matrix:
        return torch.addcmul(update, keep, state)
    return torch.baddbmm(update.flatten(0, 1), keep.flatten(0, 1), state.flatten(0, 1)).view_as(update)


def _keep_grad(keep: Tensor | None, d_update: Tensor, entering: Tensor, matrix: bool) -> Tensor | None:
    if keep is None:
        return None
    return d_update @ entering.mT if matrix else (d_update * entering).sum_to_size(keep.shape)
