"""TTT layers (Sun et al. 2024, arXiv 2407.04620): what TTT-Linear and TTT-MLP share.

    f(x; W) = x + layer_norm(model(x; W)),   W_t = W_0 - s_t sum over j <= t of eta_j grad |f(k_j; W_0) - v_j|^2 / 2
    o_t = f(q_t; W_t),   eta_t = base_lr / K * sigmoid(x_t W_lr + b),   s_t = max(1 / t + c_t, 0), t counted from 1
    y_t = layer_norm(o_t over all heads) W_o,   with a gate  y_t = (gelu(x_t W_g) * layer_norm(o_t)) W_o

A mini-batch of C tokens takes its gradients at the weights W_0 with which it began; the next one begins with W_C. q and
k carry RoPE by their place in the mini-batch. The first W_0 is learned.

B batch, T new tokens, D hidden size, H heads, K head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer, grouped, wide, wide_dtype
from zoo.architectures.core.norms import make_norm
from zoo.architectures.core.recurrent import ConvStates
from zoo.architectures.core.rope import apply_rope
from zoo.architectures.core.test_time import Learner, learn
from zoo.errors import ZooError


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """The layer of the published Transformer backbone is the default.

    `mini_batch` is C; `base_lr` is the largest learning rate, times K (published: 1 for TTT-Linear, 0.1 for TTT-MLP);
    `rope_theta` is the base of the rotation. The published Mamba backbone has `gate`, the output gate, and
    `shared_qk`: one projection for q and k, then a convolution of width `conv` for each.
    """

    heads: int
    head_dim: int
    mini_batch: int = 16
    base_lr: float = 1.0
    rope_theta: float = 10000.0
    gate: bool = False
    shared_qk: bool = False
    conv: int = 4

    def check(self, config: DecoderConfig) -> None:
        check_sizes(heads=self.heads, head_dim=self.head_dim, mini_batch=self.mini_batch, conv=self.conv)
        if self.head_dim % 2:
            raise ZooError(f"head_dim was {self.head_dim}; it must be even, for RoPE")
        if self.base_lr <= 0:
            raise ZooError(f"base_lr was {self.base_lr}; it must be positive")


class TTT(Mixer):
    """A subclass names the op's `inner` model and the `shapes` of its weights, by name."""

    inner: ClassVar[Literal["linear", "mlp"]]

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.heads, self.head_dim = args, args.heads, args.head_dim
        hidden, width = config.hidden_size, args.heads * args.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=False)
        if args.shared_qk:
            self.convs = ConvStates({"q": width, "k": width}, args.conv, None, bias=True)
        else:
            self.k_proj = nn.Linear(hidden, width, bias=False)
        self.v_proj = nn.Linear(hidden, width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        self.lr_proj = nn.Linear(hidden, self.heads, bias=True)
        for name, shape in self.shapes(self.head_dim).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(self.heads, *shape)))
        self.norm_weight = nn.Parameter(torch.ones(self.heads, self.head_dim))
        self.norm_bias = nn.Parameter(torch.zeros(self.heads, self.head_dim))
        self.step_offset = nn.Parameter(torch.zeros(args.mini_batch))
        self.o_norm = make_norm(Norm(kind="layer", eps=1e-6), width)
        if args.gate:
            self.g_proj = nn.Linear(hidden, width, bias=False)

    @staticmethod
    def shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
        raise TypeError("a TTT layer must define the shapes of its inner model")

    def init_weights(self, std: float) -> None:
        """Matrices of the inner model normal, biases zero, as published."""
        for name, shape in self.shapes(self.head_dim).items():
            if len(shape) == 2:
                initialization.normal_(getattr(self, name), std=std)
            else:
                initialization.zeros_(getattr(self, name))
        initialization.ones_(self.norm_weight)
        initialization.zeros_(self.norm_bias)
        initialization.zeros_(self.step_offset)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        q, k = self._keys(x, ctx, cache)
        v = grouped(self.v_proj(x), self.heads)
        lr = wide(self.lr_proj(x)).sigmoid() * (self.args.base_lr / self.head_dim)
        o = learn(self._learner(x), {"q": q, "k": k, "v": v, "lr": lr}, ctx, cache).to(x.dtype)
        o = self.o_norm(o.flatten(-2))
        if self.args.gate:
            o = F.gelu(self.g_proj(x), approximate="tanh") * o
        return self.o_proj(o)

    def _keys(self, x: Tensor, ctx: Context, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """q and k, `[B, T, H, K]`."""
        if self.args.shared_qk:
            shared = ctx.mask(self.q_proj(x))
            q, k = (self.convs(name, shared, ctx, cache) for name in "qk")
        else:
            q, k = self.q_proj(x), self.k_proj(x)
        table = self._table(ctx, wide_dtype(x))
        q, k = (apply_rope(grouped(part, self.heads), table, "interleaved") for part in (q, k))
        return q, k

    def _table(self, ctx: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the places in the mini-batch, `[B, T, K]`."""
        channels = torch.arange(0, self.head_dim, 2, device=ctx.positions.device, dtype=dtype)
        speeds = torch.exp(channels * (-math.log(self.args.rope_theta) / self.head_dim))
        places = (ctx.positions % self.args.mini_batch)[..., None].to(dtype)
        angles = (places * speeds).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()

    def _learner(self, x: Tensor) -> Learner:
        steps = 1 / torch.arange(1, self.args.mini_batch + 1, device=x.device, dtype=wide_dtype(x))
        return Learner(
            weights={name: wide(getattr(self, name)) for name in self.shapes(self.head_dim)},
            inner=self.inner,
            mini_batch=self.args.mini_batch,
            norm_weight=wide(self.norm_weight),
            norm_bias=wide(self.norm_bias),
            position_scale=(steps + wide(self.step_offset)).clamp(min=0),
        )

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        numbers = sum(math.prod(shape) for shape in self.shapes(self.head_dim).values())
        held = 2 * self.heads * numbers * torch.float32.itemsize + torch.int32.itemsize
        return held + (self.convs.state_bytes(itemsize) if self.args.shared_qk else 0)
