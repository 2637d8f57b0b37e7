"""Simple GLU channel (Qin et al. 2023, arXiv 2307.14995): `down(gate(x) * up(x))`, without an activation."""

from __future__ import annotations

from torch import Tensor

from zoo.architectures.channels.swiglu import SwiGLU
from zoo.architectures.core.mixer import Context

EXAMPLE = {"intermediate_size": 96}


class SimpleGLU(SwiGLU):
    def forward(self, x: Tensor, ctx: Context, cache: object = None) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


MODULE = SimpleGLU
