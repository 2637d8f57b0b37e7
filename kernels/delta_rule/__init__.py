"""The delta rule with optional decay: fast weight programmers, DeltaNet, Gated DeltaNet, Kimi Delta Attention."""

from typing import Any

from torch import Tensor

from zoo.kernels import checks, dispatch, steps

BACKENDS = dispatch.load(__name__)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None, *, qk_l2norm: bool = False,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The (gated) delta rule over T tokens.

    Args:
        q, k: [B, T, H, K], one dtype; value head j uses key head j // (Hv // H).
        v: [B, T, Hv, V].
        beta: writing strength in (0, 2), [B, T, Hv], fp32 (fp64 beside fp64 inputs).
        decay: log decay <= 0, None | [Hv] | [Hv, K] | [B, T, Hv] | [B, T, Hv, K], fp32 (fp64).
        qk_l2norm: x * rsqrt(sum(x * x) + 1e-6) on q and k, before the scale.
        scale: factor on q, K ** -0.5 by default.
        initial_state: [N, Hv, K, V], fp32 (fp64). The rest: see `zoo.kernels.dispatch`.

    Returns:
        o [B, T, Hv, V] in q's dtype, and the final state [N, Hv, K, V] or None.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.check_recurrence(q, k, v, decay, initial_state, cu_seqlens)
    checks.check_gate("beta", beta, q, v.shape[:3], "B T Hv", required=True)
    options = (beta, decay, bool(qk_l2norm), checks.default_scale(scale, q))
    return dispatch.recur(BACKENDS, backend, q, k, v, *options, initial_state, output_final_state, cu_seqlens)


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None, *, state: Tensor,
    qk_l2norm: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """One token: o [B, 1, Hv, V]; `state` [B, Hv, K, V] is overwritten. No gradient."""
    q, k, v = checks.autocast(q, k, v)
    checks.check_recurrence(q, k, v, decay, state, step=True)
    checks.check_gate("beta", beta, q, v.shape[:3], "B T Hv", required=True)
    return _STEP(q, k, v, beta, decay, bool(qk_l2norm), checks.default_scale(scale, q), state)


def _step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, *rest: Any) -> Tensor:
    norm, scale, state = rest
    return steps.matrix(state, q, k, v, decay, beta=beta, norm=norm, scale=scale)


ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? decay, bool qk_l2norm, float scale"
_STEP = steps.in_place("delta_rule_step", ARGUMENTS, _step)
