"""Gated retention (Sun et al. 2024, YOCO, arXiv 2405.05254): retention with a data-dependent decay per head.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t,   o_t = q_t S_t,   g_t = logsigmoid(x_t W_g) / 16

The output of each head passes an RMS norm without weights and a swish gate.

B batch, T new tokens, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import recur, recurrent_bytes
from zoo.architectures.core.mixer import Context, wide
from zoo.architectures.core.output import GatedOutput, OutputArgs
from zoo.errors import ZooError

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24, "rope": "default"}


@dataclass(frozen=True, kw_only=True)
class Args(OutputArgs):
    """The released layer is the default, with the rotary table that `rope` names; `decay_divisor` is the 16 above."""

    norm_weight: bool = False
    decay_divisor: float = 16.0

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        if self.decay_divisor <= 0:
            raise ZooError(f"decay_divisor was {self.decay_divisor}; it must be positive")


class GatedRetention(GatedOutput):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.key_dim, self.value_dim = args, args.head_dim, args.value_dim or args.head_dim
        self.make_projections(config, args, self.value_dim)
        self.make_output(config, args, self.value_dim)
        self.decay_proj = nn.Linear(config.hidden_size, args.heads, bias=False)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"rope": "default"}

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        q, k, v = self.expanded_qkv(x, ctx)
        decay = ctx.mask(F.logsigmoid(wide(self.decay_proj(x))) / self.args.decay_divisor)
        return self.finish(recur(q, ctx.mask(k), ctx.mask(v), decay, ctx, cache), x)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.key_dim, self.value_dim)


MODULE = GatedRetention
