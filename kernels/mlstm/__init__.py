"""The matrix LSTM of xLSTM: linear attention with an exponential input gate, under a running maximum."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks, dispatch, steps
from zoo.kernels.mlstm.reference import State, denominator
from zoo.kernels.packed import prepare

BACKENDS = dispatch.load(__name__)


def mlstm(
    q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor, *, scale: float | None = None,
    initial_state: State | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:  # fmt: skip
    """The mLSTM over T tokens.

    Args:
        q, k: [B, T, H, K], one dtype; value head j uses key head j // (Hv // H).
        v: [B, T, Hv, V].
        input_gate: [B, T, Hv], what the exponential is taken of (any soft cap is the caller's), fp32 (fp64 beside
            fp64 inputs). A token whose input gate is -inf writes nothing.
        forget_gate: [B, T, Hv], what the sigmoid is taken of, fp32 (fp64).
        scale: factor on q, K ** -0.5 by default.
        initial_state: (C [N, Hv, K, V], n [N, Hv, K], m [N, Hv]), fp32 (fp64); zeros, m too, by default. C and n are
            held divided by exp(m), and k is not scaled in them. The rest: see `zoo.kernels.dispatch`.

    Returns:
        h [B, T, Hv, V] in q's dtype, before any norm and output gate, and the final state (C, n, m) or None.

    Source: xLSTM (arXiv 2405.04517), equations 19 to 27, with the sigmoid forget gate of the published 7B model.
    """
    q, k, v = checks.autocast(q, k, v)
    _check(q, k, v, input_gate, forget_gate, initial_state, cu_seqlens)
    options = (input_gate, forget_gate, checks.default_scale(scale, q))
    return dispatch.recur(BACKENDS, backend, q, k, v, *options, initial_state, output_final_state, cu_seqlens)


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor, *, state: State,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """One token: h [B, 1, Hv, V]; the tensors of `state` (C, n, m) are overwritten. No gradient."""
    q, k, v = checks.autocast(q, k, v)
    _check(q, k, v, input_gate, forget_gate, state, None, step=True)
    return _STEP(q, k, v, input_gate, forget_gate, checks.default_scale(scale, q), list(state))


def _check(
    q: Tensor, k: Tensor, v: Tensor, write: Tensor, keep: Tensor, state: State | None, cu_seqlens: Any,
    step: bool = False,
) -> None:  # fmt: skip
    checks.check_qkv(q, k, v)
    for name, gate in (("input_gate", write), ("forget_gate", keep)):
        checks.check_gate(name, gate, q, v.shape[:3], "B T Hv", required=True)
    checks.check_sequences("q", q, cu_seqlens, step)
    heads, width, values = v.shape[2], q.shape[3], v.shape[3]
    parts = {"C": ((heads, width, values), "Hv K V"), "n": ((heads, width), "Hv K"), "m": ((heads,), "Hv")}
    checks.check_states(state, q, parts, cu_seqlens, step)


def _step(q: Tensor, k: Tensor, v: Tensor, write: Tensor, keep: Tensor, scale: float, state: list[Tensor]) -> Tensor:
    """The matrix takes a step of linear attention, with exp(input_gate - m) on the keys."""
    (c, n, m), dtype = state, q.dtype
    with checks.autocast_off(q):
        q, k, v = prepare(q, k, v)
        faded = F.logsigmoid(keep[:, 0]) + m
        m.copy_(torch.maximum(faded, write[:, 0]))
        k = k * (write[:, 0] - m).exp()[:, None, :, None]
        n.mul_((faded - m).exp().unsqueeze(-1)).add_(k[:, 0])
        read = steps.matrix(c, q, k, v, (faded - m).unsqueeze(1), scale=scale)
        normal = scale * (q * n.unsqueeze(1)).sum(-1)
        return (read / denominator(normal, m.unsqueeze(1)).unsqueeze(-1)).to(dtype)


ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor input_gate, Tensor forget_gate, float scale"
_STEP = steps.in_place("mlstm_step", ARGUMENTS, _step, tree=True)
