"""The matrix LSTM of xLSTM: linear attention with an exponential input gate, under a running maximum.

    m_t = max(log f_t + m_{t-1}, i_t)        f'_t = exp(log f_t + m_{t-1} - m_t)        i'_t = exp(i_t - m_t)
    C_t = f'_t C_{t-1} + i'_t k_t^T v_t      n_t = f'_t n_{t-1} + i'_t k_t
    h_t = scale q_t C_t / (max(|scale q_t n_t^T|, exp(-m_t)) + 1e-6)        log f_t = logsigmoid(forget_gate_t)

Shapes: B batch, T tokens, N sequences (B, or the packed ones), H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.mlstm.checking import check, state_parts
from zoo.kernels.mlstm.step import mlstm_step

__all__ = ["mlstm", "mlstm_step"]

BACKENDS = dispatch.load(__name__)


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The mLSTM over T tokens.

    Args:
        q, k: [B, T, H, K], one dtype; value head j uses key head j // (Hv // H).
        v: [B, T, Hv, V].
        input_gate: [B, T, Hv], what the exponential is taken of (any soft cap is the caller's), fp32 (fp64 beside
            fp64 inputs). A token whose input gate is -inf writes nothing.
        forget_gate: [B, T, Hv], what the sigmoid is taken of, fp32 (fp64).
        scale: factor on q, K ** -0.5 by default.
        initial_state: (C [N, Hv, K, V], n [N, Hv, K], m [N, Hv]), fp32 (fp64); zeros, m too, by default. C and n are
            held divided by exp(m), and k is not scaled in them.
        output_final_state: return the state after the last token of every sequence.
        cu_seqlens: int32 [N + 1], boundaries of sequences packed along T in a batch of 1; empty sequences are legal.
        backend: pin one of this op's backends.

    Returns:
        h [B, T, Hv, V] in q's dtype, before any norm and output gate, and the final state (C, n, m) or None.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the pinned backend cannot run the call.

    Source: xLSTM (arXiv 2405.04517), equations 19 to 27, with the sigmoid forget gate of the published 7B model.
    """
    q, k, v = checks.autocast(q, k, v)
    check(q, k, v, input_gate, forget_gate, scale)
    checks.check_length(q.shape[1], cu_seqlens)
    checks.check_cu_seqlens(cu_seqlens, q)
    checks.check_states("initial_state", initial_state, q, state_parts(q, v, checks.count_sequences(q, cu_seqlens)))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    args = (q, k, v, input_gate, forget_gate, scale, initial_state, output_final_state, cu_seqlens)
    h, state = dispatch.select(BACKENDS, backend, args).run(*args)
    return h, state
