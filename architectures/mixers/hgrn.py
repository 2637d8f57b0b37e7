"""HGRN (Qin et al. 2023, arXiv 2311.04823): an elementwise gated recurrence whose layers forget ever more slowly.

    h_t = f_t exp(i theta) h_{t-1} + (1 - f_t) silu(x_t W_i),   y_t = (rms(h_t) silu(x_t W_g)) W_o
    f_t = b_l + (1 - b_l) sigmoid(x_t W_f),   b_l rising with the layer l from 0: see `core/lower_bounds.py`

h is real and theta zero, as in the published 1.3B and 2.7B models, or complex: then W_i gives real and imaginary
parts, and both parts of h leave side by side.

B batch, T new tokens, D hidden size, N channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes, group_norm
from zoo.architectures.core.lower_bounds import BoundedForget
from zoo.architectures.core.mixer import Context, Mixer, keep_fp32, wide
from zoo.architectures.core.recurrent import gate_activation, scanned
from zoo.architectures.core.token_shift import DepthArgs

EXAMPLE = {"width": 96, "layer_index": 1, "depth": 3}
VARIANTS = {"first": {"gate": "sigmoid"}, "complex": {"width": 40, "layer_index": 2, "depth": 3, "complex": True}}
THETA = 10000.0  # the phases start as RoPE's


@dataclass(frozen=True, kw_only=True)
class Args(DepthArgs):
    """`width` is N (None: the hidden size); `complex` makes the state complex, with a learned phase per channel;
    `gate` is the output gate's activation."""

    width: int | None = None
    complex: bool = False
    gate: str | None = "silu"
    norm_eps: float = 1e-5

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(width=self.width)
        gate_activation(self.gate)


class HGRN(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, hidden = args, config.hidden_size
        self.width = args.width or hidden
        self.numbers = 2 * self.width if args.complex else self.width
        self.i_proj = nn.Linear(hidden, self.numbers, bias=False)
        self.f_proj = nn.Linear(hidden, self.width, bias=False)
        self.forget = BoundedForget(args, self.width)
        if args.gate is not None:
            self.g_proj = nn.Linear(hidden, self.numbers, bias=False)
        self.o_norm = nn.Parameter(torch.ones(self.numbers))
        self.o_proj = nn.Linear(self.numbers, hidden, bias=False)
        if args.complex:
            self.theta = keep_fp32(nn.Parameter(torch.zeros(self.width, dtype=torch.float32)))

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return {}

    def init_weights(self, std: float) -> None:
        initialization.ones_(self.o_norm)
        if self.args.layer_index:
            initialization.zeros_(self.forget.bounds.gamma)
        if self.args.complex:
            initialization.copy_(self.theta, THETA ** (-torch.arange(self.width) / self.width))

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        decay = ctx.mask(self.forget(self.f_proj(x)))
        u = F.silu(wide(self.i_proj(x)))
        if self.args.complex:
            h = self._turning(u, decay, x, ctx, cache)
        else:
            h = scanned((u * -torch.expm1(decay)).to(x.dtype), decay, ctx, cache)
        y = group_norm(h.to(x.dtype), self.o_norm, self.args.norm_eps)
        if self.args.gate is not None:
            y = y * gate_activation(self.args.gate)(self.g_proj(x))
        return self.o_proj(y)

    def _turning(self, u: Tensor, decay: Tensor, x: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        """h `[B, T, 2N]` for a state that turns by theta per token: a real scan in a frame that turns with it."""
        decay, angles = decay.repeat(1, 1, 2), ctx.positions[..., None] * wide(self.theta)
        turned = turn(u * -torch.expm1(decay), -angles)
        return turn(scanned(turned.to(x.dtype), decay, ctx, cache), angles)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return self.numbers * torch.float32.itemsize


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Complex numbers `x [B, T, 2N]`, real parts first, times `exp(i angles)`, `angles [B, T, N]`."""
    real, imaginary = wide(x).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


MODULE = HGRN
