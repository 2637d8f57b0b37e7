"""Matrix products in the precision of the call."""

from __future__ import annotations

import torch
from torch import Tensor


def low_precision(x: Tensor) -> torch.dtype | None:
    """The dtype that products may round their operands to: bf16 inputs on a GPU keep its fast products, which sum in
    fp32. All else is computed in fp32 or fp64 (fp16 too: its range is too small for states)."""
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 else None


def product(a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor:
    """a @ b in a's dtype, with the operands rounded to `low` where it is given."""
    return a @ b if low is None else (a.to(low) @ b.to(low)).to(a.dtype)
