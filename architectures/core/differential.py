"""Differential attention (Ye et al. 2024, arXiv 2410.05258): the difference of two softmax averages.

    o = (1 - s) rms(softmax(q1 k1^T) v - l softmax(q2 k2^T) v),   l = exp(lq1 . lk1) - exp(lq2 . lk2) + s

Heads go in pairs: the even ones make q1 and k1, the odd ones q2 and k2, and a pair has one value of twice the width.

B batch, T queries, S keys, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.mixer import keep_fp32, wide
from zoo.architectures.core.norms import RMSNorm

NAMES = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def lambda_start(layer: int) -> float:
    """`s` of the layer with this index, as published."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class Difference(nn.Module):
    """`forward(q [B, T, H, K], k, v [B, S, G, K], attend) -> o [B, T, H / 2, 2 K]`."""

    def __init__(self, head_dim: int, start: float) -> None:
        super().__init__()
        self.start = start
        for name in NAMES:
            self.register_parameter(name, keep_fp32(nn.Parameter(torch.zeros(head_dim, dtype=torch.float32))))
        self.norm = RMSNorm(2 * head_dim, eps=1e-5)

    def reset(self) -> None:
        """Normal of standard deviation 0.1, as published."""
        for name in NAMES:
            initialization.normal_(getattr(self, name), mean=0.0, std=0.1)
        initialization.ones_(self.norm.weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        v = v.unflatten(2, (-1, 2)).flatten(-2)
        first, second = (attend(q[:, :, half::2], k[:, :, half::2], v) for half in (0, 1))
        q1, k1, q2, k2 = (wide(getattr(self, name)) for name in NAMES)
        factor = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.start
        o = self.norm((wide(first) - factor * wide(second)).to(first.dtype))
        return o * (1.0 - self.start)
