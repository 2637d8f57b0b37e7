"""Validation shared by `mlstm` and `mlstm_step`."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks


def check(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor, scale: float | None) -> None:
    """q, k [B, T, H, K] and v [B, T, Hv, V] of one dtype, both gates [B, T, Hv] in the state dtype."""
    checks.check_qkv(q, k, v)
    for name, gate in (("input_gate", input_gate), ("forget_gate", forget_gate)):
        checks.check_tensor(name, gate)
        checks.check_gate(name, gate, q, v.shape[:3], "B T Hv")
    checks.check_scale(scale)


def state_parts(q: Tensor, v: Tensor, n: int) -> checks.Parts:
    """What the state of N sequences consists of."""
    heads, k, width = v.shape[2], q.shape[3], v.shape[3]
    return {"C": ((n, heads, k, width), "N Hv K V"), "n": ((n, heads, k), "N Hv K"), "m": ((n, heads), "N Hv")}
