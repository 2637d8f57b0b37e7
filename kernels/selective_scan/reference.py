"""Diagonal state spaces, token by token; S is [N, D, n].

mamba:     S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t
longhorn:  S_t = (1 - dt_t B_t^2) S_{t-1} + (dt_t x_t) B_t
y_t = Re(S_t C_t) + D x_t
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.checks import count_sequences, state_dtype
from zoo.kernels.sequential import State, each_token


def run(*args: Any) -> tuple[Tensor, Tensor]:
    x, dt, a, b, c, d, initial_state, _, cu_seqlens = args
    x, b, c, begin = prepare(x, a, b, c, initial_state, cu_seqlens)
    b, c = (y.expand(*x.shape, -1) if y.dim() == 2 else y for y in (b, c))
    y, (state,) = each_token(partial(_token, a), x, (x, dt, b, c), (begin,), cu_seqlens)
    return y if d is None else y + d * x, state


def _token(a: Tensor | None, state: State, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, State]:
    keep, write = transition(x, dt, a, per_channel(b, x))
    s = keep * state[0] + write
    return (s * per_channel(c, x)).sum(-1).real, (s,)


def transition(x: Tensor, dt: Tensor, a: Tensor | None, b: Tensor) -> tuple[Tensor, Tensor]:
    """What a token keeps of the state and what it writes: x, dt [..., D] and b [..., D or 1, n] to [..., D, n]."""
    dt = dt.unsqueeze(-1)
    return (1 - dt * b * b if a is None else (dt * a).exp()), dt * x.unsqueeze(-1) * b


def per_channel(y: Tensor, x: Tensor) -> Tensor:
    """[..., G, n] to [..., D, n], or left to broadcast when there is one group."""
    return y if y.shape[-2] == 1 else y.repeat_interleave(x.shape[-1] // y.shape[-2], -2)


def prepare(x: Tensor, a: Tensor | None, b: Tensor, c: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, B, C in the state dtype, B and C from tokens as [B, T, G, n], and the state that sequences begin with."""
    (initial_state, cu_seqlens), dtype = rest, state_dtype(x.dtype)
    b, c = (y if y.is_complex() else y.to(dtype) for y in (b, c))
    b, c = (y.unsqueeze(2) if y.dim() == 3 else y for y in (b, c))
    if initial_state is None:
        shape = (count_sequences(x, cu_seqlens), x.shape[2], b.shape[-1])
        initial_state = x.new_zeros(shape, dtype=state_type(x, a))
    return x.to(dtype), b, c, initial_state


def state_type(x: Tensor, a: Tensor | None) -> torch.dtype:
    """The dtype of the state: fp32 or fp64, complex beside a complex A."""
    wide = state_dtype(x.dtype)
    if a is None or not a.is_complex():
        return wide
    return torch.complex128 if wide == torch.float64 else torch.complex64  # torch.compile cannot trace to_complex
