"""SwiGLU with fixed multipliers (Falcon-H1, Zuo et al. 2025, arXiv 2507.22448).

`out_scale down(silu(gate_scale gate(x)) * up(x))`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.channels import swiglu
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context

EXAMPLE = {"intermediate_size": 96, "gate_scale": 0.8, "out_scale": 0.3}


@dataclass(frozen=True, kw_only=True)
class Args(swiglu.Args):
    gate_scale: float = 1.0
    out_scale: float = 1.0


class ScaledSwiGLU(swiglu.SwiGLU):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        self.gate_scale, self.out_scale = args.gate_scale, args.out_scale

    def forward(self, x: Tensor, ctx: Context, cache: object = None) -> Tensor:
        hidden = F.silu(self.gate_proj(x) * self.gate_scale) * self.up_proj(x)
        return self.down_proj(hidden) * self.out_scale


MODULE = ScaledSwiGLU
