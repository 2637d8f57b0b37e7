"""Diagonal state spaces: the recurrence of Mamba (arXiv 2312.00752), S4D (arXiv 2206.11893), Longhorn (2407.14207).

Shapes: n states per channel, G groups of channels.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from zoo.kernels import checks, dispatch, steps
from zoo.kernels.selective_scan.reference import state_type

BACKENDS = dispatch.load(__name__)


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor | None, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    transition: Literal["mamba", "longhorn"] = "mamba", initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A diagonal state space with n states in each of D channels, over T tokens; [B, T, D, n] is never formed.

    Args:
        x: [B, T, D].
        dt: step size >= 0 after softplus, [B, T, D], fp32 (fp64 beside fp64 inputs); Longhorn's delta.
        A: [D, n] with real part <= 0, fp32 (fp64) or complex64 (complex128); None for Longhorn, which has none.
        B, C: [B, T, n] | [B, T, G, n] (channel d uses group d // (D // G)) | [D, n] (S4D); x's dtype, fp32 (fp64), or
            complex beside a complex A.
        D: [D], the skip, fp32 (fp64).
        transition: "mamba" or "longhorn" (B is its key, C its query).
        initial_state: [N, D, n], fp32 (fp64), complex beside a complex A. The rest: see `zoo.kernels.dispatch`.

    Returns:
        y [B, T, D] in x's dtype, and the final state [N, D, n] or None. Of a complex state y takes the real part; a
        model that keeps one of each pair of conjugate states doubles C.
    """
    x, B, C = _cast(x, B, C)
    args = (x, dt, A, B, C, D)
    _check(*args, transition, initial_state, cu_seqlens)
    return dispatch.recur(BACKENDS, backend, *args, initial_state, output_final_state, cu_seqlens)


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor | None, B: Tensor, C: Tensor, D: Tensor | None = None, *, state: Tensor,
    transition: Literal["mamba", "longhorn"] = "mamba",
) -> Tensor:  # fmt: skip
    """One token: y [B, 1, D]; `state` [B, D, n] is overwritten. No gradient."""
    x, B, C = _cast(x, B, C)
    args = (x, dt, A, B, C, D)
    _check(*args, transition, state, None, step=True)
    return _STEP(*args, state)


def _cast(x: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """Under autocast x, and B and C where they are made from tokens; parameters [D, n] keep their precision."""
    (x,) = checks.autocast(x)
    return [x, *(y if isinstance(y, Tensor) and y.dim() == 2 else checks.autocast(y)[0] for y in (b, c))]


def _check(x: Tensor, dt: Tensor, a: Any, b: Tensor, c: Tensor, d: Any, *rest: Any, step: bool = False) -> None:
    transition, state, cu_seqlens = rest
    checks.check_tokens("x", x, cu_seqlens, step)
    checks.check_gate("dt", dt, x, x.shape, "B T D", required=True)
    if transition not in ("mamba", "longhorn"):
        raise ValueError(f'transition is {transition!r}; it must be "mamba" or "longhorn"')
    if transition == "longhorn" and a is not None:
        raise ValueError("A is given; Longhorn's transition has none, so it must be None")
    if transition == "mamba":
        checks.check_tensor("A", a)
    checks.check_tensor("B", b)
    states, kind = b.shape[-1] if b.dim() else 0, state_type(x, a)
    if a is not None:
        checks.check_shape("A", a, (x.shape[2], states), "D n")
        checks.check_like("A", a, x, kind)
    _check_projection("B", b, x, states, kind)
    _check_projection("C", c, x, states, kind)
    checks.check_gate("D", d, x, x.shape[2:], "D")
    checks.check_state(state, x, (x.shape[2], states), "D n", cu_seqlens, step, dtype=kind)


def _check_projection(name: str, y: Tensor, x: Tensor, states: int, kind: torch.dtype) -> None:
    checks.check_tensor(name, y)
    groups = y.shape[2] if y.dim() == 4 else 1
    shapes = {2: (x.shape[2], states), 3: (*x.shape[:2], states), 4: (*x.shape[:2], groups, states)}
    if tuple(y.shape) != shapes.get(y.dim()) or states < 1 or groups < 1 or x.shape[2] % groups:
        raise ValueError(
            f"{name} has shape {list(y.shape)}; it must be [B, T, n], [B, T, G, n] or [D, n] beside x {list(x.shape)}, "
            "with n of at least 1 and the same for A, B and C, and D a multiple of G"
        )
    allowed = dict.fromkeys((x.dtype, checks.state_dtype(x.dtype), kind))
    if y.dtype not in allowed:
        raise ValueError(f"{name} has dtype {y.dtype}; beside this x and A it must be {' or '.join(map(str, allowed))}")
    checks.check_like(name, y, x, y.dtype)


ARGUMENTS = "Tensor x, Tensor dt, Tensor? A, Tensor B, Tensor C, Tensor? D"
_STEP = steps.op("selective_scan_step", ARGUMENTS, BACKENDS["reference"].run)
