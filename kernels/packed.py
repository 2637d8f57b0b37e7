"""What the ops with keys and queries share: head groups, forms of decay, precision.

Shapes: B batch, T tokens, H key heads, Hv value heads, K and V head widths.
"""

import torch
from torch import Tensor

from zoo.kernels.checks import state_dtype


def heads(x: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, K] to [B, T, Hv, K]: value head j uses key head j // (Hv // H)."""
    groups = v.shape[2] // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, 2)


def sum_groups(x: Tensor, like: Tensor) -> Tensor:
    """The gradient of `heads`: [B, T, Hv, K] to [B, T, H, K] in the dtype of `like`."""
    return x if x.shape == like.shape else x.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


def per_token(decay: Tensor | None, v: Tensor) -> Tensor | None:
    """Any form of decay as [B, T, Hv, 1] or [B, T, Hv, K]."""
    if decay is None:
        return None
    if decay.dim() == 3:
        return decay.unsqueeze(-1)
    return decay if decay.dim() == 4 else decay.reshape(decay.shape[0], -1).expand(*v.shape[:2], -1, -1)


def prepare(q: Tensor, k: Tensor, v: Tensor, *others: Tensor, scale: float = 1.0, norm: bool = False) -> list[Tensor]:
    """All in the state dtype, and all but v with Hv heads; q and k normalised, q scaled."""
    dtype = state_dtype(q.dtype)
    q, k, *rest = (x.to(dtype) for x in (q, k, *others))
    if norm:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k, *rest = (heads(x, v) for x in (q if scale == 1 else q * scale, k, *rest))
    return [q, k, v.to(dtype), *rest]


def low_precision(x: Tensor) -> torch.dtype | None:
    """The dtype that products may round their operands to: bf16 inputs on a GPU keep its fast products, which sum in
    fp32. All else is computed in fp32 or fp64 (fp16 too: its range is too small for states)."""
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 else None


def product(a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor:
    """a @ b in a's dtype, with the operands rounded to `low` where it is given."""
    return a @ b if low is None else (a.to(low) @ b.to(low)).to(a.dtype)
