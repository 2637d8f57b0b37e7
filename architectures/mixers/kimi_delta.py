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

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.delta import inverse_softplus, published_rates, published_steps, recur
from zoo.architectures.core.linear import (
    NORM_START,
    Projected,
    ProjectionArgs,
    check_sizes,
    check_width,
    decay_rates,
    group_norm,
    norm_start,
    projection_args,
    recurrent_bytes,
    strength_bias,
)
from zoo.architectures.core.mixer import Context, grouped, keep_fp32, wide
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan, Start
from zoo.architectures.core.recurrent import ConvStates, gate_activation, identity_convs, transferred_rows

EXAMPLE = {"heads": 4, "head_dim": 16}
VARIANTS = {"wide": {"heads": 2, "head_dim": 16, "value_dim": 24, "decay_rank": 8, "gate_rank": 12, "beta_scale": 2.0}}


@dataclass(frozen=True, kw_only=True)
class Args(ProjectionArgs):
    """The published layer is the default; conversion from attention uses the other options.

    `decay_rank` (None: `head_dim`) and `gate_rank` (None: V) are the ranks of F1 F2 and G1 G2; `conv` is the width of
    the short convolutions on q, k and v (0: none), followed by `conv_activation`; `gate` is the output gate's
    activation; `norm_per_head` gives each head's norm weights of its own; `beta_scale` 2 allows negative eigenvalues;
    `scale` is the query scale (None: `head_dim ** -0.5`).
    """

    decay_rank: int | None = None
    gate_rank: int | None = None
    conv: int = 4
    conv_activation: str | None = "silu"
    gate: str = "sigmoid"
    norm_per_head: bool = False
    norm_eps: float = 1e-5
    beta_scale: float = 1.0
    beta_bias: bool = False
    scale: float | None = None

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(decay_rank=self.decay_rank, gate_rank=self.gate_rank)
        check_width(self.conv, self.conv_activation)
        gate_activation(self.gate)


class KimiDelta(Projected):
    options = Args
    starts = (
        Start(target="dt_bias", means="rate", form=lambda rates, args: inverse_softplus(rates)),
        Start(target="b_proj.bias", means="beta", form=strength_bias),
        Start(target="o_norm", means="scale", form=norm_start),
    )

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, width = args, config.hidden_size
        self.key_dim, self.value_dim = args.head_dim, args.value_dim or args.head_dim
        self.make_projections(config, args, self.value_dim)
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.b_proj = nn.Linear(width, self.heads, bias=args.beta_bias)
        self.convs = ConvStates({"q": keys, "k": keys, "v": values}, args.conv, args.conv_activation)
        decay_rank, gate_rank = args.decay_rank or self.key_dim, args.gate_rank or self.value_dim
        self.decay_down = nn.Linear(width, decay_rank, bias=False)
        self.decay_up = nn.Linear(decay_rank, keys, bias=False)
        self.A_log = keep_fp32(nn.Parameter(torch.zeros(self.heads, dtype=torch.float32)))
        self.dt_bias = keep_fp32(nn.Parameter(torch.zeros(keys, dtype=torch.float32)))
        self.gate_down = nn.Linear(width, gate_rank, bias=False)
        self.gate_up = nn.Linear(gate_rank, values, bias=False)
        shape = (self.heads, self.value_dim) if args.norm_per_head else (self.value_dim,)
        self.o_norm = nn.Parameter(torch.ones(shape))

    def init_weights(self, std: float) -> None:
        """A uniform in [1, 16] and time steps log-uniform in [1e-3, 0.1], as published."""
        initialization.copy_(self.A_log, published_rates(self.heads))
        initialization.copy_(self.dt_bias, published_steps(self.heads * self.key_dim))
        initialization.ones_(self.o_norm)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        count, d, width = spec.heads if heads is None else len(heads), spec.head_dim, spec.hidden_size
        args = projection_args(spec, count) | {"conv_activation": None, "norm_per_head": True, "beta_bias": True}
        decay_rank, gate_rank = (int(spec.wanted.get(name) or d) for name in ("decay_rank", "gate_rank"))
        rates = decay_rates(count, spec.max_position).repeat_interleave(d)
        inits = (
            Init(target="b_proj.weight", shape=(count, width), kind="zeros"),
            Init(target="b_proj.bias", shape=(count,), kind="zeros"),
            *identity_convs(spec, ("q", "k", "v"), count * d),
            *_low_rank("decay", decay_rank, count * d, width),
            Init(target="A_log", shape=(count,), kind="zeros", fp32=True),
            Init(
                target="dt_bias",
                shape=(count * d,),
                kind="values",
                options={"values": inverse_softplus(rates).tolist()},
                fp32=True,
            ),
            *_low_rank("gate", gate_rank, count * d, width),
            # the gate starts half open: sigmoid(0)
            Init(target="o_norm", shape=(count, d), kind="constant", options={"value": 2 * NORM_START}),
        )
        return MixerPlan(args=args, rows=transferred_rows(spec, heads), inits=inits)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        v = grouped(self.convs("v", ctx.mask(self.v_proj(x)), ctx, cache), self.heads)
        o = group_norm(self.mix_values(x, v, ctx, cache).to(x.dtype), self.o_norm, self.args.norm_eps)
        gate = gate_activation(self.args.gate)(grouped(self.gate_up(self.gate_down(x)), self.heads))
        return self.o_proj((o * gate).flatten(-2))

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        projections = (("q", self.q_proj), ("k", self.k_proj))
        q, k = (grouped(self.convs(n, ctx.mask(p(x)), ctx, cache), self.heads) for n, p in projections)
        q, k = self.rotated(q, k, ctx)
        beta = ctx.mask(wide(self.b_proj(x)).sigmoid() * self.args.beta_scale)
        return recur(q, ctx.mask(k), ctx.mask(v), beta, self._decay(x, ctx), ctx, cache, scale=self.args.scale)

    def _decay(self, x: Tensor, ctx: Context) -> Tensor:
        """Log decay `[B, T, H, K]` in fp32; padding does not forget."""
        steps = F.softplus(wide(self.decay_up(self.decay_down(x))) + wide(self.dt_bias))
        return ctx.mask(-wide(self.A_log).exp()[:, None] * grouped(steps, self.heads))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.key_dim, self.value_dim) + self.convs.state_bytes(itemsize)


def _low_rank(name: str, rank: int, channels: int, width: int) -> tuple[Init, ...]:
    """A map that starts small, and with a gradient in both of its factors."""
    shapes = {"down": (rank, width), "up": (channels, rank)}
    small = {"std": 0.02}
    return tuple(Init(target=f"{name}_{n}.weight", shape=s, kind="normal", options=small) for n, s in shapes.items())


MODULE = KimiDelta
