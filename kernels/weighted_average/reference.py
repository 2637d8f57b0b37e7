"""Exponentially weighted averages, token by token, with the sums kept times exp(-m) under a running maximum m.

    m_t = max(m_{t-1} + decay_t, k_t)
    a_t = e^(m_{t-1} + decay_t - m_t) a_{t-1} + e^(k_t - m_t) v_t        b_t likewise with v = 1
    o_t = a_t / b_t, or with bonus u the same from a_{t-1}, b_{t-1}, m_{t-1} and the key k_t + u, without decay

The state (a, b, m) is three times [N, D].
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.checks import count_sequences, state_dtype
from zoo.kernels.sequential import State, each_token

EMPTY = -1e38  # finite, so that the difference of two is no NaN


def run(*args: Any) -> tuple[Tensor, State]:
    k, v, decay, bonus, initial_state, _, cu_seqlens = args
    k, v, decay, begin = prepare(k, v, decay, initial_state, cu_seqlens)
    return each_token(partial(_token, bonus), v, (k, v, decay), begin, cu_seqlens)


def _token(bonus: Tensor | None, state: State, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, State]:
    numerator, denominator, maximum = state
    after = add(numerator, denominator, maximum + decay, k, v)
    read = after if bonus is None else add(numerator, denominator, maximum, k + bonus, v)
    return ratio(read[0], read[1]), after


def add(numerator: Tensor, denominator: Tensor, maximum: Tensor, k: Tensor, v: Tensor) -> State:
    """The sums and their maximum with one more value v of weight e^k."""
    top = torch.maximum(maximum, k)
    old, new = (maximum - top).exp(), (k - top).exp()
    return old * numerator + new * v, old * denominator + new, top


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where no value has any weight."""
    return numerator / torch.where(denominator == 0, 1.0, denominator)


def prepare(
    k: Tensor, v: Tensor, decay: Tensor | None, initial_state: State | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, State]:
    """k, v and the decay of every token in the state dtype, and the state that sequences begin with."""
    dtype = state_dtype(k.dtype)
    k, v = k.to(dtype), v.to(dtype)
    decay = torch.zeros_like(k[:1, :1]) if decay is None else decay
    if initial_state is None:
        zero = k.new_zeros(count_sequences(k, cu_seqlens), k.shape[2])
        initial_state = (zero, zero, torch.full_like(zero, EMPTY))
    return k, v, decay.expand(k.shape), initial_state
