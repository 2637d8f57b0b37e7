"""Validation of attention's arguments.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K and V head widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.attention.mask import Mask


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    sink_logits: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    softcap: float | None,
    scale: float | None,
    cu_seqlens: Tensor | None,
) -> None:
    _check_qkv(q, k, v)
    _check_options(mask, softcap)
    checks.check_scale(scale)
    checks.check_gate("sink_logits", sink_logits, q, (q.shape[2],), "H")
    _check_positions("q_positions", q_positions, q)
    _check_positions("k_positions", k_positions, k)
    checks.check_cu_seqlens(cu_seqlens, k)
    if cu_seqlens is not None and q.shape[1] != k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} tokens and k {k.shape[1]}; with cu_seqlens both must have the same")
    if cu_seqlens is None and 0 in (q.shape[1], k.shape[1]):
        raise ValueError(f"q has T = {q.shape[1]} and k has T = {k.shape[1]}; both must hold at least one token")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    checks.check_float("q", q)
    checks.check_dims("q", q, "B Tq H K")
    checks.check_dims("k", k, "B Tk Hk K")
    checks.check_shape("k", k, (q.shape[0], k.shape[1], k.shape[2], q.shape[3]), "B Tk Hk K")
    checks.check_dims("v", v, "B Tk Hk V")
    checks.check_shape("v", v, (*k.shape[:3], v.shape[3]), "B Tk Hk V")
    checks.check_like("k", k, q, q.dtype)
    checks.check_like("v", v, q, q.dtype)
    if k.shape[2] < 1 or q.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads; it must be a positive multiple of the {k.shape[2]} heads of k")
    if q.shape[0] < 1 or q.shape[3] < 1 or v.shape[3] < 1:
        raise ValueError(f"q {list(q.shape)} and v {list(v.shape)} must have B, K and V of at least 1")


def _check_options(mask: Mask, softcap: float | None) -> None:
    for name in ("window", "chunk", "stride", "dilation"):
        value = getattr(mask, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be None or an integer of at least 1")
    if not isinstance(mask.sink_tokens, int) or mask.sink_tokens < 0:
        raise ValueError(f"sink_tokens is {mask.sink_tokens!r}; it must be an integer of at least 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap!r}; it must be None or positive")


def _check_positions(name: str, x: Tensor | None, tokens: Tensor) -> None:
    if x is None:
        return
    checks.check_tensor(name, x)
    if tuple(x.shape) not in (tokens.shape[1:2], tokens.shape[:2]):
        raise ValueError(
            f"{name} has shape {list(x.shape)}; "
            f"it must be [T] = [{tokens.shape[1]}] or [B, T] = {list(tokens.shape[:2])}"
        )
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {x.dtype}; it must be torch.int32 or torch.int64")
    checks.check_like(name, x, tokens, x.dtype)
