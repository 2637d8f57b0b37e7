"""The inverse of unit lower triangular matrices, batched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.decays import below, pairs


class _Inverse(torch.autograd.Function):
    """X = (I + L)^-1; the gradient is dL = -X^T dX X^T, so no step of the inversion is kept for the backward pass."""

    @staticmethod
    def forward(lower: Tensor) -> Tensor:
        return _by_halves(lower)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def _by_halves(lower: Tensor) -> Tensor:
    """Inverses of the diagonal blocks of 1, 2, 4, ..: of a block [[A, 0], [L, D]] it is [[A', 0], [-D' L A', D']]."""
    blocks = torch.ones_like(lower[..., :1])[..., None]
    for level in range(lower.shape[-1].bit_length() - 1):
        first, second = pairs(blocks)
        low = -(second @ below(lower, 1 << level) @ first)
        top = torch.cat([first, torch.zeros_like(first)], -1)
        blocks = torch.cat([top, torch.cat([low, second], -1)], -2)
    return blocks.squeeze(-3)


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + lower)^-1 for strictly lower triangular `lower` [..., C, C], C a power of two."""
    inverse: Tensor = _Inverse.apply(lower)
    return inverse
