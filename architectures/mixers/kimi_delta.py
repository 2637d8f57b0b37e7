"""Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692): the delta rule with a data-dependent decay per key channel.

    S' = Diag(exp g_t) S_{t-1},   S_t = S' + k_t^T beta_t (v_t - k_t S'),   o_t = q_t S_t
    g_t = -exp(A) softplus(x_t F1 F2 + dt),   y_t = rms(o_t) sigmoid(x_t G1 G2)

q and k have length 1; A is a number per head, dt one per key channel.

B batch, T new tokens, H heads, K key and V value head dimension, R rank of decay and gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.delta import published_rates, published_steps, recur
from zoo.architectures.core.linear import check_sizes, check_width, group_norm, recurrent_bytes
from zoo.architectures.core.mixer import Context, Mixer, grouped, keep_fp32, wide
from zoo.architectures.core.recurrent import ConvStates, gate_activation

EXAMPLE = {"heads": 4, "head_dim": 16}
VARIANTS = {"wide": {"heads": 2, "head_dim": 16, "value_dim": 24, "decay_rank": 8, "gate_rank": 12, "beta_scale": 2.0}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """The published layer is the default.

    `value_dim` (None: `head_dim`) is V; `decay_rank` (None: `head_dim`) and `gate_rank` (None: V) are the ranks of
    F1 F2 and G1 G2; `conv` is the width of the short convolutions on q, k and v (0: none), followed by
    `conv_activation`; `gate` is the output gate's activation; `beta_scale` 2 allows negative eigenvalues.
    """

    heads: int
    head_dim: int
    value_dim: int | None = None
    decay_rank: int | None = None
    gate_rank: int | None = None
    conv: int = 4
    conv_activation: str | None = "silu"
    gate: str = "sigmoid"
    norm_eps: float = 1e-5
    beta_scale: float = 1.0

    def check(self, config: DecoderConfig) -> None:
        check_sizes(
            heads=self.heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            decay_rank=self.decay_rank,
            gate_rank=self.gate_rank,
        )
        check_width(self.conv, self.conv_activation)
        gate_activation(self.gate)


class KimiDelta(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.heads, width = args, args.heads, config.hidden_size
        self.key_dim, self.value_dim = args.head_dim, args.value_dim or args.head_dim
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.b_proj = nn.Linear(width, self.heads, bias=False)
        self.convs = ConvStates({"q": keys, "k": keys, "v": values}, args.conv, args.conv_activation)
        decay_rank, gate_rank = args.decay_rank or self.key_dim, args.gate_rank or self.value_dim
        self.decay_down = nn.Linear(width, decay_rank, bias=False)
        self.decay_up = nn.Linear(decay_rank, keys, bias=False)
        self.A_log = keep_fp32(nn.Parameter(torch.zeros(self.heads, dtype=torch.float32)))
        self.dt_bias = keep_fp32(nn.Parameter(torch.zeros(keys, dtype=torch.float32)))
        self.gate_down = nn.Linear(width, gate_rank, bias=False)
        self.gate_up = nn.Linear(gate_rank, values, bias=False)
        self.o_norm = nn.Parameter(torch.ones(self.value_dim))
        self.o_proj = nn.Linear(values, width, bias=False)

    def init_weights(self, std: float) -> None:
        """A uniform in [1, 16] and time steps log-uniform in [1e-3, 0.1], as published."""
        initialization.copy_(self.A_log, published_rates(self.heads))
        initialization.copy_(self.dt_bias, published_steps(self.heads * self.key_dim))
        initialization.ones_(self.o_norm)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        projections = (("q", self.q_proj), ("k", self.k_proj), ("v", self.v_proj))
        q, k, v = (grouped(self.convs(n, ctx.mask(p(x)), ctx, cache), self.heads) for n, p in projections)
        beta = wide(self.b_proj(x)).sigmoid() * self.args.beta_scale
        o = recur(q, ctx.mask(k), ctx.mask(v), ctx.mask(beta), self._decay(x, ctx), ctx, cache)
        o = group_norm(o.to(x.dtype), self.o_norm, self.args.norm_eps)
        gate = gate_activation(self.args.gate)(grouped(self.gate_up(self.gate_down(x)), self.heads))
        return self.o_proj((o * gate).flatten(-2))

    def _decay(self, x: Tensor, ctx: Context) -> Tensor:
        """Log decay `[B, T, H, K]` in fp32; padding does not forget."""
        steps = F.softplus(wide(self.decay_up(self.decay_down(x))) + wide(self.dt_bias))
        return ctx.mask(-wide(self.A_log).exp()[:, None] * grouped(steps, self.heads))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.key_dim, self.value_dim) + self.convs.state_bytes(itemsize)


MODULE = KimiDelta
