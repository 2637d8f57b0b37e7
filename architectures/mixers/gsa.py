"""Gated slot attention (Zhang et al. 2024, arXiv 2409.07146): softmax over M slots that each forget by a gate of their
own, as in gated linear attention.

    Kt_t = Diag(a_t) Kt_{t-1} + (1 - a_t)^T k_t,   Vt_t = Diag(a_t) Vt_{t-1} + (1 - a_t)^T v_t
    o_t = softmax(q_t Kt_t^T) Vt_t,   a_t = sigmoid(x_t W_f)^(1/8),   q, k, v = silu(x W)
    y_t = norm(silu(o_t)) W_O,   the norm over all heads side by side

B batch, T new tokens, H heads, M slots, K key and V value head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, grouped, wide
from zoo.architectures.core.output import GatedOutput, OutputArgs
from zoo.architectures.core.slots import slot_attention, slot_bytes
from zoo.errors import ZooError

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24, "slots": 12}


@dataclass(frozen=True, kw_only=True)
class Args(OutputArgs):
    """`slots` is M and `decay_divisor` the 8 above; `scale` multiplies the queries (None: `head_dim ** -0.5`)."""

    slots: int = 64
    decay_divisor: float = 8.0
    scale: float | None = 1.0
    gate: str | None = None
    norm_full: bool = True

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(slots=self.slots)
        if self.decay_divisor <= 0:
            raise ZooError(f"decay_divisor was {self.decay_divisor}; it must be positive")


class GatedSlotAttention(GatedOutput):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.key_dim, self.value_dim = args, args.head_dim, args.value_dim or args.head_dim
        self.make_projections(config, args, self.value_dim)
        self.make_output(config, args, self.value_dim)
        self.decay_proj = nn.Linear(config.hidden_size, args.heads * args.slots, bias=False)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (grouped(F.silu(projection(x)), self.heads) for projection in projections)
        q, k = self.rotated(q, k, ctx)
        decay = ctx.mask(F.logsigmoid(wide(grouped(self.decay_proj(x), self.heads))) / self.args.decay_divisor)
        write = -torch.expm1(decay)  # nothing where padding does not forget
        o = slot_attention(q, k, v, write.to(v.dtype), decay, ctx, cache, scale=self.args.scale)
        return self.finish(F.silu(o), x)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return slot_bytes(self.heads, self.args.slots, self.key_dim, self.value_dim)


MODULE = GatedSlotAttention
