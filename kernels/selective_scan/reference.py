"""Diagonal state spaces, token by token.

    mamba:     S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t
    longhorn:  S_t = (1 - dt_t B_t^2) S_{t-1} + (dt_t x_t) B_t
    y_t = Re(S_t C_t) + D x_t

Shapes: B batch, T tokens, N sequences, D channels, n states per channel, G groups of channels; S [N, D, n].
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zoo.kernels.checks import count_sequences, state_dtype
from zoo.kernels.packed import each_sequence
from zoo.kernels.selective_scan.checking import state_type


def supports(*args: object) -> str | None:
    return None


def run(
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        x, b, c, begin = prepare(x, a, b, c, initial_state, cu_seqlens)
        tokens, fixed = split_fixed(b, c)
        loop = partial(_tokens, a, fixed)
        y, state = each_sequence(loop, (x, dt, *tokens), begin, cu_seqlens)
        return skip(y, x, d).to(dtype), state if output_final_state else None


def _tokens(
    a: Tensor | None,
    fixed: tuple[Tensor | None, Tensor | None],
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    b: Tensor | None,
    c: Tensor | None,
) -> tuple[Tensor, Tensor]:
    outputs = [x[:, :0]]
    for t in range(x.shape[1]):
        b_t, c_t = (own if y is None else per_channel(y[:, t], x) for y, own in zip((b, c), fixed, strict=True))
        assert b_t is not None and c_t is not None
        keep, write = transition(x[:, t], dt[:, t], a, b_t)
        state = keep * state + write
        outputs.append((state * c_t).sum(-1).real[:, None])
    return torch.cat(outputs, 1), state


def transition(x: Tensor, dt: Tensor, a: Tensor | None, b: Tensor) -> tuple[Tensor, Tensor]:
    """What a token keeps of the state and what it writes: x, dt [..., D] and b [..., D or 1, n] to [..., D, n]."""
    dt = dt.unsqueeze(-1)
    return (1 - dt * b * b if a is None else (dt * a).exp()), dt * x.unsqueeze(-1) * b


def per_channel(y: Tensor, x: Tensor) -> Tensor:
    """[..., G, n] to [..., D, n], or left to broadcast when there is one group."""
    return y if y.shape[-2] == 1 else y.repeat_interleave(x.shape[-1] // y.shape[-2], -2)


def prepare(
    x: Tensor, a: Tensor | None, b: Tensor, c: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, B, C in the state dtype, B and C from tokens as [B, T, G, n], and the state that sequences begin with."""
    dtype = state_dtype(x.dtype)
    b, c = (y if y.is_complex() else y.to(dtype) for y in (b, c))
    b, c = (y.unsqueeze(2) if y.dim() == 3 else y for y in (b, c))
    if initial_state is None:
        shape = (count_sequences(x, cu_seqlens), x.shape[2], b.shape[-1])
        initial_state = x.new_zeros(shape, dtype=state_type(x, a))
    return x.to(dtype), b, c, initial_state


def split_fixed(
    b: Tensor, c: Tensor
) -> tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]:
    """B and C where they come from tokens, and where they are parameters [D, n]."""
    b_fixed, c_fixed = b.dim() == 2, c.dim() == 2
    tokens = None if b_fixed else b, None if c_fixed else c
    return tokens, (b if b_fixed else None, c if c_fixed else None)


def skip(y: Tensor, x: Tensor, d: Tensor | None) -> Tensor:
    return y if d is None else y + d * x
