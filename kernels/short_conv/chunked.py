"""Short convolution as a sum of W shifted copies of the input (the letters are those of the package)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import state_dtype


def run(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, bias, activation, initial_state, _, cu_seqlens = args
    if cu_seqlens is None:
        before = x.new_zeros(*x.shape[::2], weight.shape[1]) if initial_state is None else initial_state.to(x.dtype)
        padded = torch.cat([before.mT, x], 1)  # [B, W + T, D]
        shifted = [padded[:, i : i + x.shape[1]] for i in range(1, weight.shape[1] + 1)]
        final = padded[:, x.shape[1] :].mT.contiguous()
    else:
        shifted, final = _packed(x, initial_state, weight.shape[1], cu_seqlens)
    return _combine(shifted, weight, bias, activation), final


def _combine(shifted: list[Tensor], weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    wide = state_dtype(shifted[0].dtype)
    weight = weight.to(wide)
    y = shifted[0].to(wide) * weight[:, 0]
    for i, x in enumerate(shifted[1:], 1):
        y = torch.addcmul(y, x.to(wide), weight[:, i])
    y = y if bias is None else y + bias.to(wide)
    return F.silu(y) if activation == "silu" else y


def _packed(x: Tensor, state: Tensor | None, width: int, cu_seqlens: Tensor) -> tuple[list[Tensor], Tensor]:
    """The shifted inputs and the final state of packed sequences, by index alone: nothing is read on the host."""
    n, t = cu_seqlens.shape[0] - 1, x.shape[1]
    before = x.new_zeros(n, width, x.shape[2]) if state is None else state.mT.to(x.dtype)
    pool = torch.cat([before.flatten(0, 1), x[0]])  # [N W + T, D]
    bounds = cu_seqlens.long()
    token = torch.arange(t, device=x.device)
    owner = torch.searchsorted(bounds, token, right=True) - 1
    shifted = [_pick(pool, token, owner, bounds, shift, width)[None] for shift in range(width - 1, -1, -1)]
    owner = torch.arange(n, device=x.device)
    final = [_pick(pool, bounds[1:] - 1, owner, bounds, shift, width) for shift in range(width - 1, -1, -1)]
    return shifted, torch.stack(final, -1)


def _pick(pool: Tensor, token: Tensor, owner: Tensor, bounds: Tensor, shift: int, width: int) -> Tensor:
    """The input `shift` before each token: in its own sequence, or else in the state of that sequence."""
    begin, source = bounds[owner], token - shift
    inside = bounds.shape[0] * width - width + source
    return pool[torch.where(source >= begin, inside, (owner + 1) * width + source - begin)]
