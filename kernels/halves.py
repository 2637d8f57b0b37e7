"""By halves, in log2(C) steps, each over all blocks of a chunk at once: scans along one axis, and triangular inverses.

Shapes: C tokens of a chunk, a power of two. Scans take two arrays of one shape, with C on axis `dim`.
"""

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.decays import below, doubled, pairs


def decayed_sum(keep: Tensor, x: Tensor, dim: int) -> Any:
    """h_i = keep_i h_{i-1} + x_i with h before the first token zero; real or complex. Only products of `keep` occur,
    so that factors of at most 1 neither overflow nor divide by what has vanished."""
    return _Sum.apply(keep, x, dim, False)


def decayed_max(decay: Tensor, x: Tensor, dim: int) -> Tensor:
    """m_i = max(m_{i-1} + decay_i, x_i) with m before the first token minus infinity; no gradient."""
    return _scan(decay, x, dim, False, torch.Tensor.add_, lambda m, *x: m.copy_(torch.maximum(m, x[0] + x[1])))


class _Sum(torch.autograd.Function):
    """The gradient of a scan is the scan that runs the other way."""

    @staticmethod
    def forward(keep: Tensor, x: Tensor, dim: int, reverse: bool) -> Tensor:
        return _scan(keep, x, dim, reverse, torch.Tensor.mul_, torch.Tensor.addcmul_)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep, _, ctx.dim, ctx.reverse = inputs
        ctx.save_for_backward(keep, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keep, h = ctx.saved_tensors
        step = -1 if ctx.reverse else 1
        d_x = _Sum.apply(_shift(keep, ctx.dim, -step).conj(), grad, ctx.dim, not ctx.reverse)
        return d_x * _shift(h, ctx.dim, step).conj(), d_x, None, None


def _scan(keep: Tensor, x: Tensor, dim: int, reverse: bool, join: Any, carry: Any) -> Tensor:
    """Blocks of 1, 2, 4, ..: the half that comes later takes up the last result of the half before it."""
    h, since = x.clone(), keep.clone()
    before, after = (1, 0) if reverse else (0, 1)
    for level in range(x.shape[dim].bit_length() - 1):
        size = 1 << level
        values, steps = (y.unflatten(dim, (-1, 2, size)) for y in (h, since))
        edge = 0 if reverse else size - 1
        rest = steps.select(dim + 1, after)
        carry(values.select(dim + 1, after), rest, values.select(dim + 1, before).narrow(dim + 1, edge, 1))
        join(rest, steps.select(dim + 1, before).narrow(dim + 1, edge, 1))
    return h


def _shift(x: Tensor, dim: int, step: int) -> Tensor:
    """x moved one place along `dim`, later for step 1 and earlier for -1, with a zero in the free place."""
    edge = torch.zeros_like(x.narrow(dim, 0, 1))
    rest = x.narrow(dim, 0 if step > 0 else 1, x.shape[dim] - 1)
    return torch.cat([edge, rest] if step > 0 else [rest, edge], dim)


class _Inverse(torch.autograd.Function):
    """X = (I + L)^-1; the gradient is dL = -X^T dX X^T, so no step of the inversion is kept for the backward pass."""

    @staticmethod
    def forward(lower: Tensor) -> Tensor:
        """Of the diagonal blocks of 1, 2, 4, ..: of a block [[A, 0], [L, D]] it is [[A', 0], [-D' L A', D']]."""
        blocks = torch.ones_like(lower[..., :1])[..., None]
        for level in range(lower.shape[-1].bit_length() - 1):
            first, second = pairs(blocks)
            blocks = doubled(blocks, -(second @ below(lower, 1 << level) @ first))
        return blocks.squeeze(-3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def unit_lower_inverse(lower: Tensor) -> Any:
    """(I + lower)^-1 for strictly lower triangular `lower` [..., C, C], C a power of two."""
    return _Inverse.apply(lower)
