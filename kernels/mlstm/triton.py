"""The matrix LSTM on the Triton kernels of linear attention."""

from typing import Any

from torch import Tensor

from zoo.kernels.linear_attention import triton
from zoo.kernels.mlstm.maxima import under_maxima
from zoo.kernels.mlstm.reference import State


def supports(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str | None:
    return triton.supports(q, k, v, None, None, None, None)


def run(*args: Any) -> tuple[Tensor, State]:
    return under_maxima(_read, args)


def _read(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, gain: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    scale, state, cu_seqlens = rest
    read, normal, final, _ = triton.OP(q, k, v, decay, gain, True, scale, state, cu_seqlens, True)
    return read, normal, final
