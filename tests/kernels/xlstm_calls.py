"""Calls of mLSTM and sLSTM with their states in parts.

Shapes: B batch, T tokens, N sequences, H heads, Hv value heads, K and V head widths, D head width of the sLSTM.
"""

from __future__ import annotations

from typing import Any

import torch

from zoo.kernels.mlstm import mlstm
from zoo.kernels.slstm import slstm

OPS = {"mlstm": mlstm, "slstm": slstm}
STATES = {"mlstm": ("C", "n", "m"), "slstm": ("c", "n", "h", "m")}
D64 = torch.float64


def mlstm_inputs(t, *, b=2, n=None, spread=2.0, with_state=True, dtype=D64, sizes=(1, 2, 5, 3)):
    h, hv, k, v = sizes
    made = {
        "q": torch.randn(b, t, h, k, dtype=dtype),
        "k": torch.randn(b, t, h, k, dtype=dtype),
        "v": torch.randn(b, t, hv, v, dtype=dtype),
        "input_gate": spread * torch.randn(b, t, hv, dtype=dtype),
        "forget_gate": 2 + spread * torch.randn(b, t, hv, dtype=dtype),
    }
    state = {
        "C": torch.randn(n or b, hv, k, v, dtype=dtype),
        "n": torch.randn(n or b, hv, k, dtype=dtype),
        "m": torch.randn(n or b, hv, dtype=dtype),
    }
    return made | (state if with_state else {})


def slstm_inputs(t, *, b=2, n=None, spread=2.0, with_state=True, dtype=D64, sizes=(2, 3)):
    h, d = sizes
    gates = ("cell_input", "input_gate", "forget_gate", "output_gate")
    made = {name: spread * torch.randn(b, t, h, d, dtype=dtype) for name in gates}
    made["recurrent"] = 0.5 * torch.randn(4, h, d, d, dtype=dtype)
    state = {name: torch.randn(n or b, h, d, dtype=dtype) for name in ("c", "n", "h", "m")}
    state["n"] = 0.5 + state["n"].abs()
    return made | (state if with_state else {})


INPUTS = {"mlstm": mlstm_inputs, "slstm": slstm_inputs}


def flat(op: str):
    """The op with the tensors of its state as arguments and results of their own."""

    def run(**tensors: Any):
        state = tuple(tensors.pop(name, None) for name in STATES[op])
        given = None if state[0] is None else state
        h, final = OPS[op](**tensors, initial_state=given, output_final_state=True)
        return h, *final

    return run


def cut(tensors, begin, end):
    fixed = ("C", "c", "n", "h", "m", "recurrent")
    return {name: x if name in fixed else x[:, begin:end] for name, x in tensors.items()}


def named(op, results):
    return dict(zip(("out", *STATES[op]), results, strict=True))
