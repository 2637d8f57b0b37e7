"""Validation shared by `slstm` and `slstm_step`."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks


def check(cell_input: Tensor, input_gate: Tensor, forget_gate: Tensor, output_gate: Tensor, recurrent: Tensor) -> None:
    """cell_input [B, T, H, D], the gates alike in the state dtype, recurrent [4, H, D, D] on the same device."""
    checks.check_float("cell_input", cell_input)
    checks.check_dims("cell_input", cell_input, "B T H D")
    b, _, h, d = cell_input.shape
    if min(b, h, d) < 1:
        raise ValueError(f"cell_input has shape {list(cell_input.shape)}; B, H and D must be at least 1")
    for name, gate in (("input_gate", input_gate), ("forget_gate", forget_gate), ("output_gate", output_gate)):
        checks.check_tensor(name, gate)
        checks.check_gate(name, gate, cell_input, cell_input.shape, "B T H D")
    checks.check_float("recurrent", recurrent)
    checks.check_shape("recurrent", recurrent, (4, h, d, d), "4 H D D")
    checks.check_like("recurrent", recurrent, cell_input, recurrent.dtype)


def state_parts(cell_input: Tensor, n: int) -> checks.Parts:
    """What the state of N sequences consists of."""
    shape = (n, *cell_input.shape[2:])
    return dict.fromkeys(("c", "n", "h", "m"), (shape, "N H D"))
