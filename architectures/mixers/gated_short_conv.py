"""Gated short convolution (LFM2, Liquid AI 2025, arXiv 2511.23404): a causal depthwise convolution between two gates.

    y_t = W_out (C_t * sum_j w_j (B_{t-j} * u_{t-j})),   [B_t, C_t, u_t] = W_in h_t,   h_t the layer's input

B batch, T new tokens, D hidden size, W convolution width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer
from zoo.architectures.core.recurrent import ConvStates

EXAMPLE: dict[str, Any] = {}
VARIANTS = {"bias": {"conv": 4, "bias": True}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`conv` is the width of the convolution; `bias` is that of both projections and of the convolution."""

    conv: int = 3
    bias: bool = False

    def check(self, config: DecoderConfig) -> None:
        check_sizes(conv=self.conv)


class GatedShortConv(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        width = config.hidden_size
        self.in_proj = nn.Linear(width, 3 * width, bias=args.bias)
        self.convs = ConvStates({"u": width}, args.conv, None, bias=args.bias)
        self.out_proj = nn.Linear(width, width, bias=args.bias)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return {}

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        B, C, u = self.in_proj(x).chunk(3, dim=-1)
        return self.out_proj(C * self.convs("u", ctx.mask(B * u), ctx, cache))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return self.convs.state_bytes(itemsize)


MODULE = GatedShortConv
