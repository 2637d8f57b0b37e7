"""H3 (Fu et al. 2022, arXiv 2212.14052): two state spaces with products between them, keys and values to memory.

    o = q * diag(shift(k) * v),   q, k, v = x W + b,   y = o W_o + b_o
    shift:  k'_t = sum over j < W of w_j k_{t-j} + d k_t
    diag:   s_t = A s_{t-1} + B u_t,   y_t = 2 Re(C s_t) + D u_t

`*` is elementwise for heads of one channel; otherwise k'^T v is the outer product of a head, [K, K], every number of
which passes the head's state space, and q multiplies it as a row vector. A = (1 + z) / (1 - z) and B = dt / (1 - z),
with z = dt (-exp(a) + i omega) / 2, are diagonal (S4D with the bilinear rule): N complex numbers per head, whose
conjugates are left out.

B batch, T new tokens, D hidden size, H heads, K head dimension, W width of the shift, N states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer, grouped, keep_fp32, wide
from zoo.architectures.core.recurrent import ConvStates
from zoo.architectures.core.selected import selected
from zoo.errors import ZooError

EXAMPLE = {"head_dim": 4, "shift": 5, "state_dim": 6}
VARIANTS = {"single": {"head_dim": 1, "shift": 4, "state_dim": 8}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`head_dim` is K, `shift` is W; `state_dim` is twice N (published: both 64)."""

    head_dim: int = 1
    shift: int = 64
    state_dim: int = 64

    def check(self, config: DecoderConfig) -> None:
        check_sizes(head_dim=self.head_dim, shift=self.shift, state_dim=self.state_dim)
        if config.hidden_size % self.head_dim:
            raise ZooError(f"head_dim was {self.head_dim}; it must divide the hidden size ({config.hidden_size})")
        if self.state_dim % 2:
            raise ZooError(f"state_dim was {self.state_dim}; it must be even, for pairs of conjugate states")


class H3(Mixer):
    options = Args
    log_dt: nn.Parameter
    A_log: nn.Parameter
    omega: nn.Parameter
    C: nn.Parameter
    D: nn.Parameter

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, width = args, config.hidden_size
        self.heads, self.states = width // args.head_dim, args.state_dim // 2
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.convs = ConvStates({"k": width}, args.shift, None)
        self.shift_skip = nn.Parameter(torch.ones(width))
        shapes = dict(log_dt=(self.heads,), A_log=(self.heads, self.states), omega=(self.heads, self.states))
        shapes |= dict(C=(self.heads, self.states, 2), D=(self.heads,))
        for name, shape in shapes.items():
            self.register_parameter(name, keep_fp32(nn.Parameter(torch.zeros(shape, dtype=torch.float32))))

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return {}

    def init_weights(self, std: float) -> None:
        """S4D-Lin: A_n = -1/2 + i pi n; dt log-uniform in [1e-3, 0.1], C and both skips normal, as published."""
        initialization.uniform_(self.log_dt, math.log(1e-3), math.log(0.1))
        initialization.constant_(self.A_log, math.log(0.5))
        initialization.copy_(self.omega, (math.pi * torch.arange(self.states)).expand(self.heads, -1))
        initialization.normal_(self.C, std=0.5**0.5)
        initialization.normal_(self.D)
        initialization.normal_(self.shift_skip)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        q, k, v = (grouped(ctx.mask(p(x)), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        shifted = self.convs("k", k.flatten(-2), ctx, cache) + k.flatten(-2) * self.shift_skip.to(k.dtype)
        kv = grouped(shifted, self.heads)[..., :, None] * v[..., None, :]
        y = self._diag(kv.flatten(2), ctx, cache).view_as(kv)
        return self.o_proj((q[..., None] * y).sum(-2).flatten(-2).to(x.dtype))

    def _diag(self, u: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        """The diagonal state space over `u [B, T, H K K]`; padding neither writes nor forgets."""
        half = wide(self.log_dt).exp()[:, None] * torch.complex(-wide(self.A_log).exp(), wide(self.omega)) / 2
        A = ((1 + half) / (1 - half)).log()  # the op takes exp(A)
        C = 2 * torch.view_as_complex(wide(self.C)) * wide(self.log_dt).exp()[:, None] / (1 - half)  # B goes with C
        A, C, D = (self._spread(part) for part in (A, C, wide(self.D)))
        one, there = torch.ones_like(C.real), ctx.mask(wide(torch.ones_like(u)))
        return selected(u, there, A, one, C, D, ctx, cache)

    def _spread(self, x: Tensor) -> Tensor:
        """`[H, ...]` to the channels of the outer products, `[H K K, ...]`."""
        return x.repeat_interleave(self.args.head_dim**2, dim=0)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        channels = self.heads * self.args.head_dim**2
        return channels * self.states * torch.complex64.itemsize + self.convs.state_bytes(itemsize)


MODULE = H3
