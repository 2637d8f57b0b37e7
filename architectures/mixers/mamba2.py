"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a state-space layer with one decay per head.

    S_t = exp(A dt_t) S_{t-1} + B_t^T (dt_t x_t),   y_t = C_t S_t + D x_t
    dt_t = softplus(h_t W + dt_bias),   A = -exp(A_log),   h_t the layer's input

In terms of attention C is q, B is k and x is v. The fused `in_proj` of published checkpoints is `[z, x, B, C, dt]`, its
convolution `[x, B, C]`; here each part has its own parameters.

B batch, T new tokens, H heads, G groups (heads of B and C), P head dimension, N state dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import (
    NORM_START,
    RotatedKeys,
    check_norm,
    check_sizes,
    check_width,
    decay_rates,
    group_norm,
    recur,
    recurrent_bytes,
    rotation_args,
)
from zoo.architectures.core.mixer import Context, grouped, keep_fp32, wide
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan, Row, Start
from zoo.architectures.core.recurrent import ConvStates, check_rope, identity_convs, transferred_rows
from zoo.errors import ZooError

EXAMPLE = {"heads": 4, "head_dim": 16, "state_dim": 24, "groups": 2}
VARIANTS = {
    "norm_first": {**EXAMPLE, "norm_before_gate": True, "norm_groups": 2, "scales": (0.5, 2.0, 0.7, 1.5, 0.9)},
    "limited": {**EXAMPLE, "time_step_limit": (0.1, None), "norm": False, "conv_bias": False},
}
PROJECTIONS = ("z", "x", "B", "C", "dt", "out")
TARGETS = {"q_proj": "C_proj", "k_proj": "B_proj", "v_proj": "x_proj", "o_proj": "out_proj"}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """The published layer is the default; conversion from attention uses the other options.

    `groups` divides `heads`: heads of a group share B and C. `biases` names the projections with a bias (z, x, B, C,
    dt, out). `conv` is the width of the short convolutions on x, B and C (0: none), followed by `conv_activation`.
    `time_step_limit = (low, high)` clamps dt (high may be None). The output norm works on `norm_groups` equal parts of
    all heads' channels, after the gate unless `norm_before_gate`. `scales` multiply z, x, B, C and dt as they are
    projected (Falcon-H1). `qk_norm` and `rope` act on C and B.
    """

    heads: int
    head_dim: int
    state_dim: int
    groups: int = 1
    conv: int = 4
    conv_bias: bool = True
    conv_activation: str | None = "silu"
    time_step_limit: tuple[float, float | None] | None = None
    norm: bool = True
    norm_before_gate: bool = False
    norm_groups: int = 1
    norm_eps: float = 1e-5
    biases: tuple[str, ...] = ()
    scales: tuple[float, ...] | None = None
    qk_norm: str | None = None
    qk_norm_full: bool = False
    qk_norm_eps: float = 1e-6
    rope: str | None = None

    def check(self, config: DecoderConfig) -> None:
        check_sizes(
            heads=self.heads,
            head_dim=self.head_dim,
            state_dim=self.state_dim,
            groups=self.groups,
            norm_groups=self.norm_groups,
        )
        if self.heads % self.groups:
            raise ZooError(f"heads was {self.heads}; it must be a multiple of groups ({self.groups})")
        if self.heads * self.head_dim % self.norm_groups:
            raise ZooError(f"norm_groups was {self.norm_groups}; it must divide {self.heads * self.head_dim} channels")
        if unknown := sorted(set(self.biases) - set(PROJECTIONS)):
            raise ZooError(f"biases names {unknown[0]!r}; the projections are {', '.join(PROJECTIONS)}")
        low, high = self.time_step_limit or (0.0, None)
        if low < 0 or (high is not None and high <= low):
            raise ZooError(f"time_step_limit was {self.time_step_limit}; it must be (low, high) with 0 <= low < high")
        if self.scales is not None and len(self.scales) != 5:
            raise ZooError(f"scales was {self.scales}; it must have a number for each of z, x, B, C and dt")
        check_width(self.conv, self.conv_activation)
        check_norm("qk_norm", self.qk_norm)
        check_rope(self.rope, config)


class Mamba2(RotatedKeys):
    options = Args
    starts = (
        Start(target="A_log", means="rate", form=lambda rates, args: rates.log()),
        Start(target="norm_weight", means="scale"),
    )
    z_proj: nn.Linear
    x_proj: nn.Linear
    B_proj: nn.Linear
    C_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    D: nn.Parameter

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.heads, self.groups = args, args.heads, args.groups
        inner, keys = args.heads * args.head_dim, args.groups * args.state_dim
        widths = {"z": inner, "x": inner, "B": keys, "C": keys, "dt": args.heads}
        for name, width in widths.items():
            self.add_module(f"{name}_proj", nn.Linear(config.hidden_size, width, bias=name in args.biases))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias="out" in args.biases)
        convolved = {"x": inner, "B": keys, "C": keys}
        self.convs = ConvStates(convolved, args.conv, args.conv_activation, bias=args.conv_bias and args.conv > 0)
        for name in ("A_log", "dt_bias", "D"):
            self.register_parameter(name, keep_fp32(nn.Parameter(torch.ones(args.heads, dtype=torch.float32))))
        if args.norm:
            self.norm_weight = nn.Parameter(torch.ones(inner))
        self.make_rotation(config, args, args.groups, args.state_dim)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        """The published shape: twice the width, heads of 64, 128 states."""
        head_dim = min(64, hidden_size)
        return {"heads": 2 * hidden_size // head_dim, "head_dim": head_dim, "state_dim": 128}

    def init_weights(self, std: float) -> None:
        """-A uniform in [1, 16], time steps log-uniform in [1e-3, 0.1], D one, as published."""
        initialization.copy_(self.A_log, torch.empty(self.heads).uniform_(1, 16).log())
        dt = torch.empty(self.heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        initialization.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))
        initialization.ones_(self.D)
        if self.args.norm:
            initialization.ones_(self.norm_weight)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        count, d = spec.heads if heads is None else len(heads), spec.head_dim
        present = {"z": True, "x": spec.v_bias, "B": spec.k_bias, "C": spec.q_bias, "out": spec.o_bias}
        args: dict[str, Any] = {"heads": count, "head_dim": d, "state_dim": d, "groups": count, "norm_groups": count}
        args |= {"conv_bias": False, "conv_activation": None, "biases": [name for name, has in present.items() if has]}
        args |= rotation_args(spec)
        rows = tuple(_renamed(row) for row in transferred_rows(spec, heads))
        return MixerPlan(args=args, rows=rows, inits=_inits(spec, count))

    def expanded_qkv(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        C, B = (grouped(self._projected(name, x), self.groups) for name in ("C", "B"))
        C, B = (part.repeat_interleave(self.heads // self.groups, dim=2) for part in self.rotated(C, B, ctx))
        return C, B, grouped(self._projected("x", x), self.heads)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        u = grouped(self.convs("x", ctx.mask(self._projected("x", x)), ctx, cache), self.heads)
        y = self.mix_values(x, u, ctx, cache)
        return self.out_proj(self._gated(y.flatten(-2), self._projected("z", x)).to(x.dtype))

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        B, C = (self.convs(name, ctx.mask(self._projected(name, x)), ctx, cache) for name in ("B", "C"))
        C, B = self.rotated(grouped(C, self.groups), grouped(B, self.groups), ctx)
        dt = ctx.mask(self._time_steps(x))
        written = (wide(v) * dt[..., None]).to(x.dtype)
        y = recur(C, B, written, -wide(self.A_log).exp() * dt, ctx, cache, scale=1.0)
        return wide(y) + wide(self.D)[:, None] * wide(v)

    def _projected(self, name: str, x: Tensor) -> Tensor:
        y = getattr(self, f"{name}_proj")(x)
        return y if self.args.scales is None else y * self.args.scales[PROJECTIONS.index(name)]

    def _time_steps(self, x: Tensor) -> Tensor:
        """dt `[B, T, H]` in fp32."""
        dt = F.softplus(wide(self._projected("dt", x)) + wide(self.dt_bias))
        return dt if self.args.time_step_limit is None else dt.clamp(*self.args.time_step_limit)

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """The gate, then the norm over each group, as published; `norm_before_gate` turns them round."""
        gate = F.silu(wide(z))
        if not self.args.norm:
            return y * gate
        weight = self.norm_weight.unflatten(-1, (self.args.norm_groups, -1))

        def normed(x: Tensor) -> Tensor:
            return group_norm(x.unflatten(-1, weight.shape), weight, self.args.norm_eps).flatten(-2)

        return normed(y) * gate if self.args.norm_before_gate else normed(y * gate)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        state = recurrent_bytes(self.heads, self.args.state_dim, self.args.head_dim)
        return state + self.convs.state_bytes(itemsize)


def _renamed(row: Row) -> Row:
    name, _, rest = row.target.partition(".")
    return replace(row, target=f"{TARGETS.get(name, name)}.{rest}")


def _inits(spec: AttentionSpec, heads: int) -> tuple[Init, ...]:
    """dt starts at one, so that `A` alone sets the decay."""
    width, inner = spec.hidden_size, heads * spec.head_dim
    rates = decay_rates(heads, spec.max_position).log().tolist()
    one = math.log(math.expm1(1.0))  # softplus(one) = 1
    return (
        Init(target="dt_proj.weight", shape=(heads, width), kind="zeros"),
        Init(target="dt_bias", shape=(heads,), kind="constant", options={"value": one}, fp32=True),
        Init(target="A_log", shape=(heads,), kind="values", options={"values": rates}, fp32=True),
        Init(target="D", shape=(heads,), kind="zeros", fp32=True),
        *identity_convs(spec, ("x", "B", "C"), inner),
        Init(target="z_proj.weight", shape=(inner, width), kind="zeros"),
        # silu(1.278) = 1: the gate starts open and constant, with a gradient
        Init(target="z_proj.bias", shape=(inner,), kind="constant", options={"value": 1.27846}),
        Init(target="norm_weight", shape=(inner,), kind="constant", options={"value": NORM_START}),
    )


MODULE = Mamba2
