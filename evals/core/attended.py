"""Softmax attention weights of chosen queries, head by head, so that nothing of size [T, T] is ever held.

T tokens, Q queries, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.mixing import softmax_weights
from zoo.architectures.mixers.attention import Attention
from zoo.errors import ZooError
from zoo.evals.core.layers import Place, inputs, mixers

BLOCK = 64


def softmax_mixers(model: Any, task: str) -> dict[Place, Any]:
    """The mixers that are plain softmax attention over keys of their own, windowed or not.

    Raises:
        ZooError: there is none.
    """
    every: dict[Place, Any] = dict(mixers(model, task))
    found = {place: m for place, m in every.items() if type(m) is Attention and m.args.differential is None}
    if not found:
        raise ZooError(f"task {task!r}: the model has no layer of softmax attention to look at")
    return found


def attended(model: Any, found: dict[Place, Any], row: Tensor, queries: Sequence[int]) -> Iterator[Any]:
    """`(place, head, queries, weights [Q, T])` for at most 64 of the tokens `queries` of `row [T]` at a time, in fp32;
    keys that a query cannot see weigh 0."""
    for place, mixer, x, ctx in inputs(model, found, row):
        q, k, _ = (part.transpose(1, 2) for part in mixer.expanded_qkv(x, ctx))
        positions = ctx.positions[0]
        for head in range(mixer.heads):
            sinks = mixer.sinks[head : head + 1] if mixer.args.sink_logits else None
            for start in range(0, len(queries), BLOCK):
                block = torch.tensor(list(queries[start : start + BLOCK]), device=x.device)
                asked = q[:, head : head + 1, block]
                weights = softmax_weights(mixer.args, asked, k[:, head : head + 1], positions, positions[block], sinks)
                yield place, head, block.tolist(), weights[0, 0]
