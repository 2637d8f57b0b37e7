"""What mixers over the `selective_scan` op share: the scan over the cache.

B batch, T new tokens, I channels, N states per channel.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.mixer import Context, wide_dtype
from zoo.architectures.core.recurrent import continued
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
    """`selective_scan` of `x, dt [B, T, I]`, over the cache's `state [B, I, N]` (complex beside a complex A)."""
    states = {"state": (x.shape[2], B.shape[-1])}
    dtype = wide_dtype(x) if A is None else A.dtype
    options: dict[str, Any] = dict(dtype=dtype, transition=transition)
    return continued(selective_scan, selective_scan_step, (x, dt, A, B, C, D), states, ctx, cache, **options)
