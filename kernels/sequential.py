"""Recurrences whose state is several tensors: one chunk after the other, or one packed sequence after the other.

Shapes: B batch, M chunks, N sequences (B, or the packed ones); the tensors of a state are [B, ...], or [N, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.checks import host_values
from zoo.kernels.chunks import Chunks

State = tuple[Any, ...]
Run = Callable[..., tuple[Tensor, State]]


def each_chunk(chunks: Chunks, run: Run, initial: State, parts: Sequence[Any]) -> tuple[Tensor, State]:
    """`run(state, *part of this chunk) -> (output, state)` over the M chunks, with restarts at packed sequences.

    `initial` holds a state for each of the N sequences; every entry of `parts` has M parts, or is None. Returns the
    stacked outputs and the final state of each sequence.
    """
    state = initial if chunks.sequence is None else tuple(x[:1] for x in initial)
    # Slices would fill gradients with zeros.
    split = [x.unbind(0) if isinstance(x, Tensor) else x for x in parts]
    outputs, states = [], []
    for m in range(chunks.count):
        if chunks.sequence is not None:
            state = _restart(chunks, m, state, initial)
        o, state = run(state, *(None if x is None else x[m] for x in split))
        outputs.append(o)
        states.append(state)
    final = state if chunks.sequence is None else _finals(chunks, states, initial)
    return torch.stack(outputs), final


def _restart(chunks: Chunks, m: int, state: State, initial: State) -> State:
    assert chunks.sequence is not None and chunks.first is not None
    first, owner = chunks.first[m], chunks.sequence[m : m + 1]
    return tuple(torch.where(first, x.index_select(0, owner), s) for s, x in zip(state, initial, strict=True))


def _finals(chunks: Chunks, states: list[State], initial: State) -> State:
    """After the last chunk of each packed sequence; an empty one leaves its initial state as it was."""
    assert chunks.last is not None and chunks.empty is not None
    found = []
    for before, after in zip(initial, zip(*states, strict=True), strict=True):
        last = torch.cat(after).index_select(0, chunks.last)
        found.append(torch.where(chunks.empty.view(-1, *[1] * (last.dim() - 1)), before, last))
    return tuple(found)


def each_sequence(
    run: Run, inputs: Sequence[Tensor | None], initial: State, cu_seqlens: Tensor | None
) -> tuple[Tensor, State]:
    """`run(state, *inputs)` over the batch, or over the packed sequences in turn (reading cu_seqlens on the host)."""
    if cu_seqlens is None:
        return run(initial, *inputs)
    ends = host_values(cu_seqlens)
    outputs, states = [], []
    for n, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        part = [None if x is None else x[:, begin:end] for x in inputs]
        o, final = run(tuple(x[n : n + 1] for x in initial), *part)
        outputs.append(o)
        states.append(final)
    return torch.cat(outputs, 1), tuple(torch.cat(x) for x in zip(*states, strict=True))
