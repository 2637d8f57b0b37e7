"""What mixers over the `delta_rule` op share: the recurrence over the cache, and how published time steps start.

B batch, T new tokens, H key heads, Hv value heads, K key and V value head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.mixer import Context, wide_dtype
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
    """`delta_rule` of `q, k [B, T, H, K]` and `v [B, T, Hv, V]`; the cache's `state` is continued and kept."""
    args: dict[str, Any] = dict(qk_l2norm=qk_l2norm, scale=scale)
    if cache is None:
        return delta_rule(q, k, v, beta, decay, cu_seqlens=ctx.cu_seqlens, **args)[0]
    shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    state = cache.state("state", shape, wide_dtype(q), "recurrent", q.device)
    if ctx.phase == "decode" and q.shape[1] == 1 and not torch.is_grad_enabled():
        return delta_rule_step(q, k, v, beta, decay, state=state, **args)
    o, new = delta_rule(q, k, v, beta, decay, initial_state=state, output_final_state=True, **args)
    assert new is not None
    cache.put("state", new)
    return o


def published_rates(heads: int) -> Tensor:
    """`A_log [heads]` with A uniform in [1, 16]."""
    return torch.empty(heads).uniform_(1, 16).log()


def published_steps(count: int) -> Tensor:
    """`dt_bias [count]` whose softplus is log-uniform in [1e-3, 0.1]."""
    dt = torch.empty(count).uniform_(math.log(1e-3), math.log(0.1)).exp()
    return dt + torch.log(-torch.expm1(-dt))
