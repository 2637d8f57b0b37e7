"""RWKV-4 time mixing (Peng et al. 2023, arXiv 2305.13048): a decayed average of values, weighted by exponential keys.

    wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same with v = 1),   w = exp(time_decay)
    y_t = (sigmoid(r_t) * wkv_t) W_o,   r, k, v = (mu x_t + (1 - mu) x_{t-1}) W, each with its own mu

B batch, T new tokens, D hidden size, A channels of the average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.averaged import average_bytes, averaged
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer, keep_fp32, wide
from zoo.architectures.core.token_shift import DepthArgs, decay_speeds, mixed, ramp, token_shift

EXAMPLE = {"attention_size": 48, "layer_index": 1, "depth": 3}


@dataclass(frozen=True, kw_only=True)
class Args(DepthArgs):
    """`attention_size` is A (None: the hidden size)."""

    attention_size: int | None = None

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(attention_size=self.attention_size)


class RWKV4(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, width = args, config.hidden_size
        self.width, self.channels = width, args.attention_size or width
        self.k_proj = nn.Linear(width, self.channels, bias=False)
        self.v_proj = nn.Linear(width, self.channels, bias=False)
        self.r_proj = nn.Linear(width, self.channels, bias=False)
        self.o_proj = nn.Linear(self.channels, width, bias=False)
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.ones(width)) for _ in range(3))
        self.time_decay, self.time_first = (
            keep_fp32(nn.Parameter(torch.zeros(self.channels, dtype=torch.float32))) for _ in range(2)
        )

    def init_weights(self, std: float) -> None:
        """As published: deeper layers look back less, channels from slow to fast."""
        args, weights = self.args, ramp(self.width)
        initialization.copy_(self.mix_k, weights**args.left)
        initialization.copy_(self.mix_v, weights**args.left + 0.3 * args.risen)
        initialization.copy_(self.mix_r, weights ** (0.5 * args.left))
        initialization.copy_(self.time_decay, decay_speeds(self.channels, -5.0, 8.0, 0.7 + 1.3 * args.risen))
        zigzag = 0.5 * ((torch.arange(self.channels) + 1) % 3 - 1)
        initialization.copy_(self.time_first, math.log(0.3) + zigzag)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        before = token_shift(x, ctx, cache)
        k = self.k_proj(mixed(before, x, self.mix_k))
        v = self.v_proj(mixed(before, x, self.mix_v))
        r = self.r_proj(mixed(before, x, self.mix_r))
        wkv = averaged(k, v, -wide(self.time_decay).exp(), wide(self.time_first), ctx, cache)
        return self.o_proj(r.sigmoid() * wkv.to(r.dtype))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return average_bytes(self.channels) + self.width * itemsize


MODULE = RWKV4
