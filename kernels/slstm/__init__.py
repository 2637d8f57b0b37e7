"""The scalar LSTM of xLSTM: exponential input gate, running maximum, and recurrent weights on its own output.

h_{t-1} enters the gates, so tokens can only be taken one by one.
"""

from typing import Any

from torch import Tensor

from zoo.kernels import checks, dispatch, steps

BACKENDS = dispatch.load(__name__)

State = tuple[Tensor, Tensor, Tensor, Tensor]


def slstm(
    cell_input: Tensor, input_gate: Tensor, forget_gate: Tensor, output_gate: Tensor, recurrent: Tensor, *,
    initial_state: State | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:  # fmt: skip
    """The sLSTM over T tokens.

    Args:
        cell_input: [B, T, H, D] of H heads, what tanh is taken of once the recurrent part is added; any float dtype.
        input_gate, forget_gate, output_gate: [B, T, H, D], likewise for exp, sigmoid and sigmoid, biases included;
            fp32 (fp64 beside fp64 inputs). A token whose input gate is -inf writes nothing.
        recurrent: [4, H, D, D] for the input gate, forget gate, cell input and output gate in this order; h_{t-1}
            of a head multiplies from the left; any float dtype.
        initial_state: (c, n, h, m), each [N, H, D], fp32 (fp64); zeros by default. c and n are held divided by exp(m);
            where n is 0 nothing was written yet, and c and m are not read. The rest: see `zoo.kernels.dispatch`.

    Returns:
        h [B, T, H, D] in cell_input's dtype, before any norm, and the final state (c, n, h, m) or None.

    Source: xLSTM (arXiv 2405.04517), equations 8 to 17, with the sigmoid forget gate.
    """
    (cell_input,) = checks.autocast(cell_input)
    inputs = (cell_input, input_gate, forget_gate, output_gate, recurrent)
    _check(*inputs, initial_state, cu_seqlens, step=False)
    return dispatch.recur(BACKENDS, backend, *inputs, initial_state, output_final_state, cu_seqlens)


def slstm_step(
    cell_input: Tensor, input_gate: Tensor, forget_gate: Tensor, output_gate: Tensor, recurrent: Tensor, *,
    state: State,
) -> Tensor:  # fmt: skip
    """One token: h [B, 1, H, D]; `state` is (c, n, h, m), four different tensors that are overwritten. No gradient."""
    (cell_input,) = checks.autocast(cell_input)
    inputs = (cell_input, input_gate, forget_gate, output_gate, recurrent)
    _check(*inputs, state, None, step=True)
    return _STEP(*inputs, list(state))


def _check(
    x: Tensor, write: Tensor, keep: Tensor, read: Tensor, recurrent: Tensor, state: Any, cu_seqlens: Any, step: bool
) -> None:
    checks.check_tokens("cell_input", x, cu_seqlens, step, "B T H D")
    h, d = x.shape[2:]
    for name, gate in (("input_gate", write), ("forget_gate", keep), ("output_gate", read)):
        checks.check_gate(name, gate, x, x.shape, "B T H D", required=True)
    checks.check_shape("recurrent", recurrent, (4, h, d, d), "4 H D D")
    checks.check_like("recurrent", recurrent, x)
    checks.check_states(state, x, dict.fromkeys(("c", "n", "h", "m"), ((h, d), "H D")), cu_seqlens, step)


ARGUMENTS = "Tensor cell_input, Tensor input_gate, Tensor forget_gate, Tensor output_gate, Tensor recurrent"
_STEP = steps.op("slstm_step", ARGUMENTS, BACKENDS["reference"].run, tree=True)
