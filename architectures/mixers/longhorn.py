"""Longhorn (Liu et al. 2024, arXiv 2407.14207): a state space that solves online regression in closed form.

    S_t = (1 - delta_t k_t^2) S_{t-1} + (delta_t x_t) k_t,   y_t = S_t q_t + D x_t
    delta_t = beta_t / (1 + beta_t |k_t|^2),   beta_t = sigmoid(r_t W_b + b)
    [x, z] = h_t W_in,  x passes a short convolution,  [r, k, q] = x_t W_x

Every channel keeps N numbers; what a token forgets follows from its key, so there is no A. The output is
`(y * silu(z)) W_out`.

B batch, T new tokens, I inner channels, N states per channel, R rank of beta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes, check_width
from zoo.architectures.core.mixer import Context, Mixer, keep_fp32, wide
from zoo.architectures.core.recurrent import ConvStates
from zoo.architectures.core.selected import selected

EXAMPLE = {"inner": 96, "state_dim": 8}
VARIANTS = {"bias": {"inner": 64, "state_dim": 5, "beta_rank": 3, "conv": 3, "conv_bias": False, "bias": True}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`inner` channels with `state_dim` states each; the published layer has twice the hidden size and 16.

    `beta_rank` is R (None: a sixteenth of the hidden size, rounded up); `conv` the width of the short convolution (0:
    none); `bias` that of the projections in and out.
    """

    inner: int
    state_dim: int = 16
    beta_rank: int | None = None
    conv: int = 4
    conv_bias: bool = True
    bias: bool = False

    def check(self, config: DecoderConfig) -> None:
        check_sizes(inner=self.inner, state_dim=self.state_dim, beta_rank=self.beta_rank)
        check_width(self.conv, "silu")


class Longhorn(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.inner, self.states = args, args.inner, args.state_dim
        self.rank = args.beta_rank or math.ceil(config.hidden_size / 16)
        self.in_proj = nn.Linear(config.hidden_size, 2 * self.inner, bias=args.bias)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.states, bias=False)
        self.beta_proj = nn.Linear(self.rank, self.inner, bias=False)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=args.bias)
        self.convs = ConvStates({"x": self.inner}, args.conv, "silu", bias=args.conv_bias and args.conv > 0)
        self.beta_bias = keep_fp32(nn.Parameter(torch.zeros(self.inner, dtype=torch.float32)))
        self.D = keep_fp32(nn.Parameter(torch.ones(self.inner, dtype=torch.float32)))

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return {"inner": 2 * hidden_size}

    def init_weights(self, std: float) -> None:
        """beta a half, D one, as published."""
        initialization.zeros_(self.beta_bias)
        initialization.ones_(self.D)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.convs("x", ctx.mask(u), ctx, cache)
        r, k, q = self.x_proj(u).split((self.rank, self.states, self.states), dim=-1)
        beta = (wide(self.beta_proj(r)) + wide(self.beta_bias)).sigmoid()
        delta = beta / (1 + beta * wide(k).square().sum(-1, keepdim=True))
        y = selected(u, ctx.mask(delta), None, k, q, wide(self.D), ctx, cache, "longhorn")
        return self.out_proj((wide(y) * F.silu(wide(z))).to(y.dtype))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return self.inner * self.states * torch.float32.itemsize + self.convs.state_bytes(itemsize)


MODULE = Longhorn
