"""Validation shared by `dplr` and `dplr_step`."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks


def check(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor | None, scale: float | None) -> None:
    """q, k, a, b [B, T, H, K] and v [B, T, Hv, V] of one dtype; any form of decay."""
    checks.check_qkv(q, k, v)
    for name, x in (("a", a), ("b", b)):
        checks.check_shape(name, x, q.shape, "B T H K")
        checks.check_like(name, x, q, q.dtype)
    checks.check_decay(decay, q, v)
    checks.check_scale(scale)
