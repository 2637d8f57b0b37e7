"""GeGLU channel (Shazeer 2020, arXiv 2002.05202): `down(gelu(gate(x)) * up(x))`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoo.architectures.channels import swiglu
from zoo.architectures.core.activations import ACTIVATIONS
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context

EXAMPLE = {"intermediate_size": 96}
VARIANTS = {"exact": {"intermediate_size": 96, "tanh": False, "bias": True}}


@dataclass(frozen=True, kw_only=True)
class Args(swiglu.Args):
    """`tanh` takes the approximation of gelu by a hyperbolic tangent (Gemma), not the exact function."""

    tanh: bool = True


class GeGLU(swiglu.SwiGLU):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        self.gelu = ACTIVATIONS["gelu_tanh" if args.tanh else "gelu"]

    def forward(self, x: Tensor, ctx: Context, cache: object = None) -> Tensor:
        return self.down_proj(self.gelu(self.gate_proj(x)) * self.up_proj(x))


MODULE = GeGLU
