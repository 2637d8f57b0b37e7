"""The delta rule with optional decay: fast weight programmers, DeltaNet, Gated DeltaNet, Kimi Delta Attention.

    S' = Diag(exp decay_t) S_{t-1}        S_t = S' + k_t^T beta_t (v_t - k_t S')        o_t = scale q_t S_t

Shapes: B batch, T tokens, N sequences (B, or the packed ones), H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.delta_rule.step import delta_rule_step

__all__ = ["delta_rule", "delta_rule_step"]

BACKENDS = dispatch.load(__name__)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    qk_l2norm: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The (gated) delta rule over T tokens.

    Args:
        q, k: [B, T, H, K], one dtype; value head j uses key head j // (Hv // H).
        v: [B, T, Hv, V].
        beta: writing strength in (0, 2), [B, T, Hv], fp32 (fp64 beside fp64 inputs).
        decay: log decay <= 0, None | [Hv] | [Hv, K] | [B, T, Hv] | [B, T, Hv, K], fp32 (fp64).
        qk_l2norm: x * rsqrt(sum(x * x) + 1e-6) on q and k, before the scale.
        scale: factor on q, K ** -0.5 by default.
        initial_state: [N, Hv, K, V], fp32 (fp64).
        output_final_state: return the state after the last token of every sequence.
        cu_seqlens: int32 [N + 1], boundaries of sequences packed along T in a batch of 1; empty sequences are legal.
        backend: pin one of this op's backends.

    Returns:
        o [B, T, Hv, V] in q's dtype, and the final state [N, Hv, K, V] or None.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the pinned backend cannot run the call.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.check_qkv(q, k, v)
    checks.check_tensor("beta", beta)
    checks.check_gate("beta", beta, q, v.shape[:3], "B T Hv")
    checks.check_decay(decay, q, v)
    checks.check_scale(scale)
    checks.check_length(q.shape[1], cu_seqlens)
    checks.check_cu_seqlens(cu_seqlens, q)
    checks.check_state(initial_state, q, v, cu_seqlens, v.shape[3])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    args = (q, k, v, beta, decay, bool(qk_l2norm), scale, initial_state, output_final_state, cu_seqlens)
    o, state = dispatch.select(BACKENDS, backend, args).run(*args)
    return o, state
