"""RWKV-5 "Eagle" time mixing (Peng et al. 2024, arXiv 2404.05892): heads with a matrix state and a bonus for the token
itself.

    S_t = Diag(w) S_{t-1} + k_t^T v_t,   o_t = r_t (S_{t-1} + Diag(u) k_t^T v_t),   w = exp(-exp(time_decay))
    y_t = (silu(g_t) * norm(o_t)) W_o,   r, k, v, g = (mu x_t + (1 - mu) x_{t-1}) W, each with its own mu

w and u are vectors over the channels of a head; the norm is a layer norm of each head.

B batch, T new tokens, D hidden size, H heads, K head dimension.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import recur, recurrent_bytes
from zoo.architectures.core.mixer import Context, Mixer, grouped, keep_fp32, wide
from zoo.architectures.core.norms import head_norm
from zoo.architectures.core.token_shift import HeadArgs, bonuses, decay_speeds, mixed, ramp, token_shift

EXAMPLE = {"heads": 2, "head_dim": 16, "layer_index": 1, "depth": 3}

Args = HeadArgs


class RWKV5(Mixer):
    options: ClassVar[type[HeadArgs]] = Args
    mixes: ClassVar[tuple[str, ...]] = ("r", "k", "v", "g")  # what has a mixing weight of its own

    def __init__(self, config: DecoderConfig, args: HeadArgs) -> None:
        super().__init__()
        self.args, self.width, self.heads = args, config.hidden_size, args.heads
        inner = args.heads * args.head_dim
        self.r_proj = nn.Linear(self.width, inner, bias=False)
        self.k_proj = nn.Linear(self.width, inner, bias=False)
        self.v_proj = nn.Linear(self.width, inner, bias=False)
        self.g_proj = nn.Linear(self.width, inner, bias=False)
        self.o_proj = nn.Linear(inner, self.width, bias=False)
        for name in self.mixes:
            self.register_parameter(f"mix_{name}", nn.Parameter(torch.zeros(self.width)))
        self.bonus = keep_fp32(nn.Parameter(torch.zeros(args.heads, args.head_dim, dtype=torch.float32)))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(inner)), nn.Parameter(torch.zeros(inner))
        self.make_decay(config, args)

    def make_decay(self, config: DecoderConfig, args: HeadArgs) -> None:
        self.time_decay = keep_fp32(nn.Parameter(torch.zeros(args.heads, args.head_dim, dtype=torch.float32)))

    def init_weights(self, std: float) -> None:
        """As published: deeper layers look back less, channels from slow to fast."""
        for name, weight in self.start_of_mixes().items():
            initialization.copy_(getattr(self, f"mix_{name}"), weight)
        initialization.copy_(self.bonus, bonuses(self.heads, self.args.head_dim, self.args.risen))
        initialization.ones_(self.norm_weight)
        initialization.zeros_(self.norm_bias)
        initialization.copy_(self.time_decay, self.start_of_decay().view_as(self.time_decay))

    def start_of_mixes(self) -> dict[str, Tensor]:
        """Shares of the token itself."""
        weights, args = ramp(self.width), self.args
        early, late = weights**args.left, weights ** (0.5 * args.left)
        return {"r": late, "k": early, "v": early + 0.3 * args.risen, "g": late}

    def start_of_decay(self) -> Tensor:
        return decay_speeds(self.heads * self.args.head_dim, -6.0, 5.0, 0.7 + 1.3 * self.args.risen)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        inputs = self.inputs(x, token_shift(x, ctx, cache))
        projections = (("r", self.r_proj), ("k", self.k_proj), ("v", self.v_proj))
        r, k, v = (grouped(projection(inputs[name]), self.heads) for name, projection in projections)
        decay = self.decay(inputs, ctx)
        o = recur(r, ctx.mask(k), ctx.mask(v), decay, ctx, cache, scale=1.0, bonus=wide(self.bonus))
        o = head_norm(o, self.norm_weight, self.norm_bias, self.args.norm_eps)
        return self.o_proj(F.silu(self.g_proj(inputs["g"])) * o.to(x.dtype))

    def inputs(self, x: Tensor, before: Tensor) -> dict[str, Tensor]:
        """The mix of `x` and the token `before` it that each projection reads, `[B, T, D]`."""
        return {name: mixed(before, x, getattr(self, f"mix_{name}")) for name in self.mixes}

    def decay(self, inputs: dict[str, Tensor], ctx: Context) -> Tensor:
        """Log decay `[H, K]`, or `[B, T, H, K]` where padding does not forget."""
        decay = -wide(self.time_decay).exp()
        return decay if ctx.padding_mask is None else ctx.mask(decay.expand(*ctx.padding_mask.shape, *decay.shape))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.args.head_dim, self.args.head_dim) + self.width * itemsize


MODULE = RWKV5
