"""The scalar LSTM for one token at a time (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.slstm.checking import check, state_parts
from zoo.kernels.slstm.reference import cell, prepare


@torch.no_grad()
def slstm_step(
    cell_input: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    output_gate: Tensor,
    recurrent: Tensor,
    *,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Tensor:
    """One token of `slstm`: the same arguments with T = 1.

    `state` is (c, n, h, m), each [B, H, D] in fp32 (fp64 beside fp64 inputs); its tensors are overwritten, so they must
    be four different ones. Returns h [B, 1, H, D] in cell_input's dtype. No gradient.
    """
    (cell_input,) = checks.autocast(cell_input)
    check(cell_input, input_gate, forget_gate, output_gate, recurrent)
    checks.check_one_token(cell_input, "cell_input")
    checks.check_states("state", state, cell_input, state_parts(cell_input, cell_input.shape[0]), optional=False)
    with torch.autocast(cell_input.device.type, enabled=False):
        inputs, recurrent = prepare(cell_input, input_gate, forget_gate, output_gate, recurrent)
        found = cell(state, inputs[:, 0] + torch.einsum("bhd,ghde->bhge", state[2], recurrent))
        for old, new in zip(state, found, strict=True):
            old.copy_(new)
        return state[2].unsqueeze(1).to(cell_input.dtype, copy=True)
