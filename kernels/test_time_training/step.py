"""Test-time training for one token at a time (decoding)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.test_time_training.checking import check, check_tree
from zoo.kernels.test_time_training.dual import advance
from zoo.kernels.test_time_training.reference import prepare
from zoo.kernels.test_time_training.states import OFFSET, WEIGHTS, names


@torch.no_grad()
def test_time_training_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: Mapping[str, Tensor],
    *,
    state: Mapping[str, Tensor],
    inner: Literal["linear", "mlp"] = "linear",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    momentum: Tensor | None = None,
    decay: Tensor | None = None,
    position_scale: Tensor | None = None,
    mini_batch: int = 16,
) -> Tensor:
    """One token of `test_time_training`: the same arguments with T = 1.

    The tensors of `state` are overwritten (`test_time_training_state` makes the first). Returns o [B, 1, Hv, V] in q's
    dtype. No gradient.
    """
    q, k, v = checks.autocast(q, k, v)
    check(q, k, v, lr, weights, inner, norm_weight, norm_bias, momentum, decay, position_scale, mini_batch)
    checks.check_one_token(q)
    check_tree("state", state, q, weights, inner, momentum, decay, None)
    dtype, keys = q.dtype, names(inner, momentum is not None, decay is not None)
    norm = None if norm_weight is None else (norm_weight, norm_bias)
    row = None if position_scale is None else _row(position_scale, state[OFFSET])
    gates = [None if x is None else x.mT for x in (lr, momentum, decay)]
    with torch.autocast(q.device.type, enabled=False):
        own = [x.transpose(1, 2) for x in prepare(q, k, v)]
        before = tuple(state[key] for key in keys)
        scale = None if row is None else row[..., None, None]
        parts: list[Any] = [*own, *gates, None, state[OFFSET] == mini_batch - 1]
        o, after = advance(len(WEIGHTS[inner]), norm, scale, row, before, *parts)
    for old, new in zip((*before, state[OFFSET]), (*after, (state[OFFSET] + 1) % mini_batch), strict=True):
        old.copy_(new)
    return o.transpose(1, 2).to(dtype)


def _row(position_scale: Tensor, offset: Tensor) -> Tensor:
    """The factor at the place of each sequence's token: [B, 1] or [B, Hv]."""
    return position_scale[..., offset.long()].reshape(-1, offset.shape[0]).mT
