"""Normalisation of hidden vectors. D channels (last axis)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architectures.core.config import Norm
from zoo.architectures.core.mixer import wide


class RMSNorm(nn.Module):
    """`weight * x / rms(x)`, computed in fp32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(wide(x), (x.shape[-1],), eps=self.eps).to(x.dtype)
        return normed * self.weight.to(x.dtype)


class OnePlusRMSNorm(nn.Module):
    """`(1 + weight) * x / rms(x)` with a zero-centred weight (Gemma, Qwen3-Next)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(wide(x), (x.shape[-1],), eps=self.eps)
        return (normed * (1.0 + wide(self.weight))).to(x.dtype)


class PlainRMSNorm(nn.Module):
    """`x / rms(x)`, without parameters (SimpleRMSNorm of TransNormerLLM)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(wide(x), (x.shape[-1],), eps=self.eps).to(x.dtype)


class L2Norm(nn.Module):
    """`x / |x|`, without parameters."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + self.eps)).to(x.dtype)


def make_norm(norm: Norm, dim: int) -> nn.Module:
    """The module for `norm` over `dim` channels."""
    if norm.kind == "layer":
        return nn.LayerNorm(dim, eps=norm.eps, bias=norm.bias)
    kinds = {"rms": RMSNorm, "rms_one_plus": OnePlusRMSNorm, "rms_plain": PlainRMSNorm, "l2": L2Norm}
    return kinds[norm.kind](dim, norm.eps)


def head_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of each head of `x [..., H, V]` in fp32, then `weight` and `bias` `[H * V]`: `[..., H * V]` in x's
    dtype."""
    y = F.layer_norm(wide(x), (x.shape[-1],), eps=eps).flatten(-2) * wide(weight)
    return (y if bias is None else y + wide(bias)).to(x.dtype)
