"""Short convolution as a sum of W shifted copies of the input (the letters are those of the package)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import count_sequences, state_dtype


def run(*args: Any) -> tuple[Tensor, Tensor]:
    """The W inputs of its state stand before every sequence: nothing else tells packed ones apart."""
    x, weight, bias, activation, state, _, cu_seqlens = args
    (d, width), n, t, wide = weight.shape, count_sequences(x, cu_seqlens), x.shape[1], state_dtype(x.dtype)
    before = x.new_zeros(n, width, d) if state is None else state.mT.to(x.dtype)
    if cu_seqlens is None:
        rows = torch.cat([before, x], 1)  # [B, W + T, D]
        final = rows[:, t:]
    else:  # [1, N W + T, D]
        token, each = torch.arange(t, device=x.device), torch.arange(width, device=x.device)
        place = token + width * torch.searchsorted(cu_seqlens[1:], token, right=True)  # less W
        starts = cu_seqlens.long() + width * torch.arange(n + 1, device=x.device)
        rows = x.new_empty(1, n * width + t, d).index_copy(1, place + width, x)
        rows = rows.index_copy(1, (starts[:-1, None] + each).flatten(), before.flatten(0, 1)[None])
        final = rows[0][starts[1:, None] - width + each]
    size, weight = rows.shape[1] - width, weight.to(wide)
    y = rows[:, 1 : 1 + size].to(wide) * weight[:, 0]
    for i in range(1, width):
        y = torch.addcmul(y, rows[:, 1 + i : 1 + i + size].to(wide), weight[:, i])
    y = y if cu_seqlens is None else y.index_select(1, place)
    y = y if bias is None else y + bias.to(wide)
    return F.silu(y) if activation == "silu" else y, final.mT.contiguous()
