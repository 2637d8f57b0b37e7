"""Diagonal-plus-low-rank transitions: RWKV-7, and every delta rule whose erase and write vectors differ.

Both terms read the undecayed S_{t-1}. RWKV-7 passes a = -kappa, b = kappa * eta and scale = 1.
"""

from typing import Any

from torch import Tensor

from zoo.kernels import checks, dispatch, steps

BACKENDS = dispatch.load(__name__)


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor | None = None, *, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The recurrence with a diagonal-plus-rank-one transition over T tokens.

    Args:
        q, k: [B, T, H, K], one dtype; value head j uses key head j // (Hv // H).
        v: [B, T, Hv, V].
        a: what is read from the state before its decay, [B, T, H, K], q's dtype.
        b: where that is written back, [B, T, H, K], q's dtype. The state stays bounded as long as the norm of
            Diag(exp decay) + b^T a is at most 1, as in RWKV-7; that is not checked.
        decay: log decay <= 0, None | [Hv] | [Hv, K] | [B, T, Hv] | [B, T, Hv, K], fp32 (fp64 beside fp64 inputs).
        scale: factor on q, K ** -0.5 by default.
        initial_state: [N, Hv, K, V], fp32 (fp64). The rest: see `zoo.kernels.dispatch`.

    Returns:
        o [B, T, Hv, V] in q's dtype, and the final state [N, Hv, K, V] or None.

    Source: RWKV-7 "Goose" (arXiv 2503.14456), transposed to row vectors.
    """
    q, k, v, a, b = checks.autocast(q, k, v, a, b)
    checks.check_recurrence(q, k, v, decay, initial_state, cu_seqlens)
    _check_low_rank(q, a, b)
    options = (a, b, decay, checks.default_scale(scale, q))
    return dispatch.recur(BACKENDS, backend, q, k, v, *options, initial_state, output_final_state, cu_seqlens)


def dplr_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor | None = None, *, state: Tensor,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """One token: o [B, 1, Hv, V]; `state` [B, Hv, K, V] is overwritten. No gradient."""
    q, k, v, a, b = checks.autocast(q, k, v, a, b)
    checks.check_recurrence(q, k, v, decay, state, step=True)
    _check_low_rank(q, a, b)
    return _STEP(q, k, v, a, b, decay, checks.default_scale(scale, q), state)


def _check_low_rank(q: Tensor, a: Tensor, b: Tensor) -> None:
    for name, x in (("a", a), ("b", b)):
        checks.check_shape(name, x, q.shape, "B T H K")
        checks.check_like(name, x, q, q.dtype)


def _step(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    decay, scale, state = rest
    return steps.matrix(state, q, k, v, decay, a=a, b=b, scale=scale)


ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? decay, float scale"
_STEP = steps.in_place("dplr_step", ARGUMENTS, _step)
