"""What mixers over the `delta_rule` op share: the recurrence over the cache, and how published time steps start.

B batch, T new tokens, H key heads, Hv value heads, K key and V value head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.recurrent import continued
from zoo.kernels.delta_rule import delta_rule, delta_rule_step


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    ctx: Context,
    cache: LayerCache | None,
    *,
    qk_l2norm: bool = True,
    scale: float | None = None,
) -> Tensor:
    """`delta_rule` of `q, k [B, T, H, K]` and `v [B, T, Hv, V]`, over the cache's `state`."""
    states = {"state": (v.shape[2], q.shape[3], v.shape[3])}
    options: dict[str, Any] = dict(qk_l2norm=qk_l2norm, scale=scale)
    return continued(delta_rule, delta_rule_step, (q, k, v, beta, decay), states, ctx, cache, **options)


def published_rates(heads: int) -> Tensor:
    """`A_log [heads]` with A uniform in [1, 16]."""
    return torch.empty(heads).uniform_(1, 16).log()


def published_steps(count: int) -> Tensor:
    """`dt_bias [count]` whose softplus is log-uniform in [1e-3, 0.1]."""
    return inverse_softplus(torch.empty(count).uniform_(math.log(1e-3), math.log(0.1)).exp())


def inverse_softplus(x: Tensor) -> Tensor:
    """`y` with `softplus(y) = x`."""
    return x + torch.log(-torch.expm1(-x))
