"""Mamba (Gu and Dao 2023, arXiv 2312.00752): a selective state space with a decay per channel and state.

    S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t,   y_t = S_t C_t + D x_t,   A = -exp(A_log)
    [x, z] = h_t W_in,  x passes a short convolution,  [r, B, C] = x_t W_x,  dt = softplus(r W_dt + dt_bias)

The output is `(y * silu(z)) W_out`. Falcon-Mamba and Jamba normalise r, B and C.

B batch, T new tokens, I inner channels, N states per channel, R rank of dt.
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
from zoo.architectures.core.mixer import Context, Mixer, Output, keep_fp32, wide
from zoo.architectures.core.norms import RMSNorm
from zoo.architectures.core.recurrent import ConvStates
from zoo.architectures.core.selected import selected
from zoo.errors import ZooError

NORMS = ("rms", "weightless")
EXAMPLE = {"inner": 96, "state_dim": 8}
VARIANTS = {
    "normed": {**EXAMPLE, "dt_rank": 5, "bias": True, "conv_bias": False, "norm": "rms", "norm_eps": 1e-5},
    "weightless": {**EXAMPLE, "state_dim": 5, "conv": 3, "norm": "weightless"},
}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`inner` channels with `state_dim` states each; the published layer has twice the hidden size and 16.

    `dt_rank` is the rank of the time steps' projection (None: a sixteenth of the hidden size, rounded up); `conv` the
    width of the short convolution (0: none); `bias` that of the projections in and out. `norm` normalises the low-rank
    time steps, B and C: "rms" with learned weights (Jamba) or "weightless" (Falcon-Mamba).
    `writes` is a name under which mixer `gmu` in later layers finds y, the output before its gate.
    """

    inner: int
    state_dim: int = 16
    dt_rank: int | None = None
    conv: int = 4
    conv_bias: bool = True
    bias: bool = False
    norm: str | None = None
    norm_eps: float = 1e-6
    writes: str | None = None

    def check(self, config: DecoderConfig) -> None:
        check_sizes(inner=self.inner, state_dim=self.state_dim, dt_rank=self.dt_rank)
        check_width(self.conv, "silu")
        if self.norm is not None and self.norm not in NORMS:
            raise ZooError(f"norm was {self.norm!r}; it must be one of {', '.join(NORMS)}, or null for none")


class Mamba(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.inner, self.states = args, args.inner, args.state_dim
        self.rank = args.dt_rank or math.ceil(config.hidden_size / 16)
        self.in_proj = nn.Linear(config.hidden_size, 2 * self.inner, bias=args.bias)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.states, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner, bias=False)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=args.bias)
        self.convs = ConvStates({"x": self.inner}, args.conv, "silu", bias=args.conv_bias and args.conv > 0)
        self.A_log = keep_fp32(nn.Parameter(torch.zeros(self.inner, self.states, dtype=torch.float32)))
        self.dt_bias = keep_fp32(nn.Parameter(torch.zeros(self.inner, dtype=torch.float32)))
        self.D = keep_fp32(nn.Parameter(torch.ones(self.inner, dtype=torch.float32)))
        if args.norm == "rms":
            for name, size in (("dt_norm", self.rank), ("B_norm", self.states), ("C_norm", self.states)):
                self.add_module(name, RMSNorm(size, args.norm_eps))

    @classmethod
    def writes_of(cls, args: Args) -> tuple[str, ...]:
        return () if args.writes is None else (args.writes,)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return {"inner": 2 * hidden_size}

    def init_weights(self, std: float) -> None:
        """A = -1 ... -N, time steps log-uniform in [1e-3, 0.1], D one, as published."""
        rates = torch.arange(1, self.states + 1, dtype=torch.float32).log()
        initialization.copy_(self.A_log, rates.expand(self.inner, -1))
        dt = torch.empty(self.inner).uniform_(math.log(1e-3), math.log(0.1)).exp()
        initialization.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))
        initialization.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        initialization.ones_(self.D)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Output:
        """`x [B, T, D] -> [B, T, D]`, and y `[B, T, I]` for later layers if it is written."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        y = self._scan(self.convs("x", ctx.mask(u), ctx, cache), ctx, cache)
        out = self.out_proj((wide(y) * F.silu(wide(z))).to(y.dtype))
        return out if self.args.writes is None else (out, {self.args.writes: y})

    def _scan(self, u: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        """`u [B, T, I]`, after the convolution, to `y [B, T, I]`, before the gate."""
        dt, B, C = self._selection(u)
        return selected(u, ctx.mask(dt), -wide(self.A_log).exp(), B, C, wide(self.D), ctx, cache)

    def _selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt `[B, T, I]` in fp32, B and C `[B, T, N]`, all made from `u [B, T, I]`."""
        parts = self.x_proj(u).split((self.rank, self.states, self.states), dim=-1)
        r, B, C = (self._normed(part, name) for part, name in zip(parts, ("dt_norm", "B_norm", "C_norm"), strict=True))
        return F.softplus(wide(self.dt_proj(r)) + wide(self.dt_bias)), B, C

    def _normed(self, part: Tensor, name: str) -> Tensor:
        if self.args.norm == "weightless":
            return F.rms_norm(wide(part), part.shape[-1:], eps=self.args.norm_eps).to(part.dtype)
        return part if self.args.norm is None else self.get_submodule(name)(part)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return self.inner * self.states * torch.float32.itemsize + self.convs.state_bytes(itemsize)


MODULE = Mamba
