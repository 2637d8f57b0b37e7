"""The scalar LSTM of xLSTM: exponential input gate, running maximum, and recurrent weights on its own output.

    (i_t, f_t, z_t, o_t) = inputs_t + h_{t-1} R        per head, R = (R_i, R_f, R_z, R_o)
    m_t = max(log f_t + m_{t-1}, i_t)        f'_t = exp(log f_t + m_{t-1} - m_t)        i'_t = exp(i_t - m_t)
    c_t = f'_t c_{t-1} + i'_t tanh(z_t)      n_t = f'_t n_{t-1} + i'_t                  log f = logsigmoid(f_t)
    h_t = sigmoid(o_t) c_t / n_t

h_{t-1} enters the gates, so tokens can only be taken one by one.

Shapes: B batch, T tokens, N sequences (B, or the packed ones), H heads, D head width.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.slstm.checking import check, state_parts
from zoo.kernels.slstm.step import slstm_step

__all__ = ["slstm", "slstm_step"]

BACKENDS = dispatch.load(__name__)


def slstm(
    cell_input: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    output_gate: Tensor,
    recurrent: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor] | None]:
    """The sLSTM over T tokens.

    Args:
        cell_input: [B, T, H, D], what tanh is taken of once the recurrent part is added; any float dtype.
        input_gate, forget_gate, output_gate: [B, T, H, D], likewise for exp, sigmoid and sigmoid, biases included;
            fp32 (fp64 beside fp64 inputs). A token whose input gate is -inf writes nothing.
        recurrent: [4, H, D, D] for the input gate, forget gate, cell input and output gate in this order; h_{t-1}
            of a head multiplies from the left; any float dtype.
        initial_state: (c, n, h, m), each [N, H, D], fp32 (fp64); zeros by default. c and n are held divided by exp(m);
            where n is 0 nothing was written yet, and c and m are not read.
        output_final_state: return the state after the last token of every sequence.
        cu_seqlens: int32 [N + 1], boundaries of sequences packed along T in a batch of 1; empty sequences are legal.
        backend: pin one of this op's backends.

    Returns:
        h [B, T, H, D] in cell_input's dtype, before any norm, and the final state (c, n, h, m) or None.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the pinned backend cannot run the call.

    Source: xLSTM (arXiv 2405.04517), equations 8 to 17, with the sigmoid forget gate.
    """
    (cell_input,) = checks.autocast(cell_input)
    check(cell_input, input_gate, forget_gate, output_gate, recurrent)
    checks.check_length(cell_input.shape[1], cu_seqlens, "cell_input")
    checks.check_cu_seqlens(cu_seqlens, cell_input)
    parts = state_parts(cell_input, checks.count_sequences(cell_input, cu_seqlens))
    checks.check_states("initial_state", initial_state, cell_input, parts)
    args = (cell_input, input_gate, forget_gate, output_gate, recurrent, initial_state, output_final_state, cu_seqlens)
    h, state = dispatch.select(BACKENDS, backend, args).run(*args)
    return h, state
