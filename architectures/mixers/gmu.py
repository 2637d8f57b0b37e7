"""Gated memory unit (Ren et al. 2025, SambaY, arXiv 2507.06607): gates what an earlier layer read from its state.

    y_t = W_2 (silu(W_1 x_t) * m_t),   m_t the output of that layer's recurrence, before its gate

It has no recurrence and no cache of its own.

B batch, T new tokens, I channels of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architectures.core import mixer
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer

BEFORE = (("mamba", {"inner": 96, "state_dim": 8, "writes": "memory"}),)
EXAMPLE = {"inner": 96, "memory": "memory"}
VARIANTS = {"bias": {**EXAMPLE, "bias": True}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`memory` is the name that the writing layer gives as `writes`, `inner` the number of its channels."""

    inner: int
    memory: str = "memory"
    bias: bool = False

    def check(self, config: DecoderConfig) -> None:
        check_sizes(inner=self.inner)


class GatedMemoryUnit(Mixer):
    options = Args
    bidirectional = True  # by itself it looks at no other token

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.memory = args.memory
        self.in_proj = nn.Linear(config.hidden_size, args.inner, bias=args.bias)
        self.out_proj = nn.Linear(args.inner, config.hidden_size, bias=args.bias)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return {"inner": 2 * hidden_size}

    @classmethod
    def reads_of(cls, args: Args) -> tuple[str, ...]:
        return (args.memory,)

    def forward(self, x: Tensor, ctx: Context, cache: object = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        gate = F.silu(self.in_proj(x))
        return self.out_proj(gate * ctx.values[self.memory].to(gate.dtype))


MODULE = GatedMemoryUnit
