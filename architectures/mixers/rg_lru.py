"""Griffin's recurrent block around the RG-LRU, a real gated linear recurrent unit (De et al. 2024, arXiv 2402.19427).

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t),   a_t = exp(-8 softplus(a_param) r_t)
    r_t, i_t = sigmoid of block-diagonal projections of u_t,   u = conv(W_x x)
    y_t = W_o (gelu(W_y x_t) * h_t)

A sequence's first token enters unscaled: `h_0 = i_0 u_0`.

B batch, T new tokens, H blocks of the gates, N channels of the recurrence, K = N / H.
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
from zoo.architectures.core.activations import ACTIVATIONS
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer, grouped, keep_fp32, wide
from zoo.architectures.core.recurrent import ConvStates, scanned
from zoo.errors import ZooError

EXAMPLE = {"heads": 4, "width": 96}
VARIANTS = {"exact_gelu": {"heads": 2, "width": 32, "conv": 3, "tanh": False}}
SHARPNESS = 8.0
STEEPEST = 1000.0  # largest slope of the square root, as published


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`width` channels of the recurrence, `heads` blocks of the gates, `conv` the width of the short convolution;
    `tanh` takes the approximation of the branch's gelu by a hyperbolic tangent, not the exact function."""

    heads: int
    width: int
    conv: int = 4
    tanh: bool = True

    def check(self, config: DecoderConfig) -> None:
        check_sizes(heads=self.heads, width=self.width, conv=self.conv)
        if self.width % self.heads:
            raise ZooError(f"width was {self.width}; it must be a multiple of heads ({self.heads})")


class BlockLinear(nn.Module):
    """One linear map `[K, K]` per head: `[B, T, H, K] -> [B, T, H, K]`."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width, width))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def reset(self) -> None:
        initialization.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[-1]))
        initialization.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bthi,hio->btho", x, self.weight) + self.bias


class RGLRU(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.gelu = args, ACTIVATIONS["gelu_tanh" if args.tanh else "gelu"]
        self.x_proj = nn.Linear(config.hidden_size, args.width)
        self.y_proj = nn.Linear(config.hidden_size, args.width)
        self.convs = ConvStates({"x": args.width}, args.conv, None, bias=True)
        self.input_gate = BlockLinear(args.heads, args.width // args.heads)
        self.recurrent_gate = BlockLinear(args.heads, args.width // args.heads)
        self.a_param = keep_fp32(nn.Parameter(torch.zeros(args.width, dtype=torch.float32)))
        self.out_proj = nn.Linear(args.width, config.hidden_size)

    def init_weights(self, std: float) -> None:
        """`exp(-softplus(a_param))` spread over 0.9 to 0.999, even in its square, as published."""
        self.input_gate.reset()
        self.recurrent_gate.reset()
        rates = -0.5 * torch.empty(self.args.width).uniform_(0.9**2, 0.999**2).log()
        initialization.copy_(self.a_param, torch.expm1(rates).log())

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return {"heads": heads, "width": hidden_size}

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        u = self.convs("x", ctx.mask(self.x_proj(x)), ctx, cache)
        gate, decay = self._gates(u)
        # the state before a first token is zero, so that its decay needs no special value
        scale = bounded_sqrt(-torch.expm1(2 * decay))
        scale = torch.where((ctx.positions == 0)[..., None], torch.ones_like(scale), scale)
        h = scanned(ctx.mask(u * (gate * scale).to(u.dtype)), ctx.mask(decay), ctx, cache)
        return self.out_proj(self.gelu(self.y_proj(x)) * h)

    def _gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The input gate and the log decay `[B, T, N]` in fp32."""
        blocks = grouped(u, self.args.heads)
        i, r = (torch.sigmoid(wide(gate(blocks))).flatten(-2) for gate in (self.input_gate, self.recurrent_gate))
        return i, -SHARPNESS * F.softplus(wide(self.a_param)) * r

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return self.args.width * torch.float32.itemsize + self.convs.state_bytes(itemsize)


def bounded_sqrt(x: Tensor) -> Tensor:
    """The square root of `x >= 0`, with a slope of at most `STEEPEST`: finite gradients where a decay is near one."""
    edge = 1 / (2 * STEEPEST) ** 2
    line = STEEPEST * x
    near = line + (x.sqrt() - line).detach()
    return torch.where(x < edge, near, x.clamp(min=edge).sqrt())


MODULE = RGLRU
