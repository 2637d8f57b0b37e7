"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the delta rule with a data-dependent decay per head.

    S' = exp(g_t) S_{t-1},   S_t = S' + k_t^T beta_t (v_t - k_t S'),   o_t = q_t S_t
    g_t = -exp(A) softplus(a_t + dt)

B batch, T new tokens, H key heads, Hv value heads, K key and V value head dimension, W convolution width.
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
    ProjectionArgs,
    RotatedKeys,
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
from zoo.errors import ZooError

EXAMPLE = {"heads": 2, "head_dim": 16, "value_heads": 4, "value_dim": 24}


@dataclass(frozen=True, kw_only=True)
class Args(ProjectionArgs):
    """The published layer is the default; conversion from attention uses the other options.

    `conv` is the width of the short convolutions on q, k and v (0: none), followed by `conv_activation`; `gate` is the
    output gate's activation (silu, sigmoid or None); `norm` puts an RMS norm on each head's output, with weights of its
    own per head if `norm_per_head`; `beta_scale` 2 allows negative eigenvalues; `scale` is the query scale (None:
    `head_dim ** -0.5`).
    """

    value_heads: int | None = None
    conv: int = 4
    conv_activation: str | None = "silu"
    gate: str | None = "silu"
    gate_bias: bool = False
    norm: bool = True
    norm_per_head: bool = False
    norm_eps: float = 1e-5
    beta_scale: float = 1.0
    beta_bias: bool = False
    scale: float | None = None

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        value_heads = self.value_heads or self.heads
        if value_heads % self.heads:
            raise ZooError(f"value_heads was {value_heads}; it must be a multiple of heads ({self.heads})")
        check_width(self.conv, self.conv_activation)
        gate_activation(self.gate)


class GatedDeltaNet(RotatedKeys):
    options = Args
    starts = (
        Start(target="dt_bias", means="rate", form=lambda rates, args: inverse_softplus(rates)),
        Start(target="b_proj.bias", means="beta", form=strength_bias),
        Start(target="o_norm", means="scale", form=norm_start),
    )

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, width = args, config.hidden_size
        self.heads, self.key_dim = args.heads, args.head_dim
        self.value_heads, self.value_dim = args.value_heads or args.heads, args.value_dim or args.head_dim
        keys, values = self.heads * self.key_dim, self.value_heads * self.value_dim
        self.q_proj = nn.Linear(width, keys, bias=args.q_bias)
        self.k_proj = nn.Linear(width, keys, bias=args.k_bias)
        self.v_proj = nn.Linear(width, values, bias=args.v_bias)
        self.a_proj = nn.Linear(width, self.value_heads, bias=False)
        self.b_proj = nn.Linear(width, self.value_heads, bias=args.beta_bias)
        self.A_log = keep_fp32(nn.Parameter(torch.zeros(self.value_heads, dtype=torch.float32)))
        self.dt_bias = keep_fp32(nn.Parameter(torch.zeros(self.value_heads, dtype=torch.float32)))
        self.convs = ConvStates({"q": keys, "k": keys, "v": values}, args.conv, args.conv_activation)
        if args.gate is not None:
            self.g_proj = nn.Linear(width, values, bias=args.gate_bias)
        if args.norm:
            shape = (self.value_heads, self.value_dim) if args.norm_per_head else (self.value_dim,)
            self.o_norm = nn.Parameter(torch.ones(shape))
        self.o_proj = nn.Linear(values, width, bias=args.o_bias)
        self.make_rotation(config, args, self.heads, self.key_dim)

    def init_weights(self, std: float) -> None:
        """A uniform in [1, 16] and time steps log-uniform in [1e-3, 0.1], as published."""
        initialization.copy_(self.A_log, published_rates(self.value_heads))
        initialization.copy_(self.dt_bias, published_steps(self.value_heads))
        if self.args.norm:
            initialization.ones_(self.o_norm)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        kept = tuple(range(spec.heads)) if heads is None else heads
        count, d = len(kept), spec.head_dim
        args = projection_args(spec, count) | {"conv": 4, "conv_activation": None, "gate": "silu", "gate_bias": True}
        args |= {"norm_per_head": True, "beta_bias": True}
        rates = decay_rates(count, spec.max_position)  # the decay is softplus(dt_bias), with A = 1
        inits = [
            Init(target="a_proj.weight", shape=(count, spec.hidden_size), kind="zeros"),
            Init(target="b_proj.weight", shape=(count, spec.hidden_size), kind="zeros"),
            Init(target="b_proj.bias", shape=(count,), kind="constant", options={"value": 0.0}),
            Init(target="A_log", shape=(count,), kind="zeros", fp32=True),
            Init(
                target="dt_bias",
                shape=(count,),
                kind="values",
                options={"values": inverse_softplus(rates).tolist()},
                fp32=True,
            ),
            *identity_convs(spec, ("q", "k", "v"), count * d),
            Init(target="g_proj.weight", shape=(count * d, spec.hidden_size), kind="zeros"),
            # silu(1.278) = 1: the gate starts open and constant, with a gradient
            Init(target="g_proj.bias", shape=(count * d,), kind="constant", options={"value": 1.27846}),
            Init(target="o_norm", shape=(count, d), kind="constant", options={"value": NORM_START}),
        ]
        return MixerPlan(args=args, rows=transferred_rows(spec, heads), inits=tuple(inits))

    def _qk(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return self.rotated(grouped(q, self.heads), grouped(k, self.heads), ctx)

    def expanded_qkv(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self._qk(self.q_proj(x), self.k_proj(x), ctx)
        return q, k, grouped(self.v_proj(x), self.value_heads)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        v = grouped(self.convs("v", ctx.mask(self.v_proj(x)), ctx, cache), self.value_heads)
        o = self.mix_values(x, v, ctx, cache)
        return self.o_proj(self._output(o.to(x.dtype), x).flatten(-2))

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        projections = (("q", self.q_proj), ("k", self.k_proj))
        q, k = (self.convs(name, ctx.mask(project(x)), ctx, cache) for name, project in projections)
        q, k = self._qk(q, k, ctx)
        return recur(q, ctx.mask(k), ctx.mask(v), *self._gates(x, ctx), ctx, cache, scale=self.args.scale)

    def _gates(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """beta and log decay, `[B, T, Hv]` fp32; padding neither writes nor forgets."""
        beta = wide(self.b_proj(x)).sigmoid() * self.args.beta_scale
        decay = -wide(self.A_log).exp() * F.softplus(wide(self.a_proj(x)) + wide(self.dt_bias))
        return ctx.mask(beta), ctx.mask(decay)

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        if self.args.norm:
            o = group_norm(o, self.o_norm, self.args.norm_eps)
        if self.args.gate is not None:
            o = o * gate_activation(self.args.gate)(grouped(self.g_proj(x), self.value_heads))
        return o

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.value_heads, self.key_dim, self.value_dim) + self.convs.state_bytes(itemsize)


MODULE = GatedDeltaNet
