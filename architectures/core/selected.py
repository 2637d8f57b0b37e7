"""What mixers over the `selective_scan` op share: the scan over the cache.

B batch, T new tokens, I channels, N states per channel.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.mixer import Context, wide_dtype
from zoo.kernels.selective_scan import selective_scan, selective_scan_step


def selected(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    ctx: Context,
    cache: LayerCache | None,
    transition: Literal["mamba", "longhorn"] = "mamba",
) -> Tensor:
    """`selective_scan` of `x, dt [B, T, I]`; the cache's `state [B, I, N]` (complex beside a complex A) is continued
    and kept."""
    args: tuple[Any, ...] = (x, dt, A, B, C, D)
    if cache is None:
        return selective_scan(*args, transition=transition, cu_seqlens=ctx.cu_seqlens)[0]
    dtype = wide_dtype(x) if A is None else A.dtype
    state = cache.state("state", (x.shape[0], x.shape[2], B.shape[-1]), dtype, "recurrent", x.device)
    if ctx.phase == "decode" and x.shape[1] == 1 and not torch.is_grad_enabled():
        return selective_scan_step(*args, transition=transition, state=state)
    y, new = selective_scan(*args, transition=transition, initial_state=state, output_final_state=True)
    assert new is not None
    cache.put("state", new)
    return y
