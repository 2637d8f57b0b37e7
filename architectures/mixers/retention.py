"""Retention (Sun et al. 2023, arXiv 2307.08621): linear attention with a fixed decay per head and rotary positions.

    S_t = gamma_h S_{t-1} + k_t^T v_t,   o_t = q_t S_t / sqrt(K),   gamma_h = 1 - 2^(-5 - h)
    y_t = (silu(x_t W_G) * norm(o_t)) W_O,   the norm over each head alone

Queries and keys carry RoPE; the scale of xPos is the decay. The norm of the released code is RMS, that of the paper
group norm (`norm_center`).

B batch, T new tokens, H heads, K key and V value head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.features import fixed_decay
from zoo.architectures.core.linear import projection_args, recur, recurrent_bytes
from zoo.architectures.core.mixer import Context, grouped, wide_dtype
from zoo.architectures.core.output import OPEN_GATE, SCALE, GatedOutput, OutputArgs, open_gate
from zoo.architectures.core.plan import AttentionSpec, MixerPlan
from zoo.architectures.core.recurrent import transferred_rows

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24, "rope": "default"}
VARIANTS = {"group_norm": {**EXAMPLE, "norm_center": True, "norm_per_head": True}}


@dataclass(frozen=True, kw_only=True)
class Args(OutputArgs):
    """The released layer is the default, with the rotary table that `rope` names."""

    norm_eps: float = 1e-6


class Retention(GatedOutput):
    options = Args
    starts = (SCALE,)

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.key_dim, self.value_dim = args.head_dim, args.value_dim or args.head_dim
        self.make_projections(config, args, self.value_dim)
        self.make_output(config, args, self.value_dim)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, object]:
        return super().default_args(hidden_size, heads) | {"rope": "default"}

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        count = spec.heads if heads is None else len(heads)
        inits = open_gate(count, spec.head_dim, spec.hidden_size)
        return MixerPlan(args=projection_args(spec, count) | OPEN_GATE, rows=transferred_rows(spec, heads), inits=inits)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        return self.finish(self.mix_values(x, grouped(self.v_proj(x), self.heads), ctx, cache), x)

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        q, k = self.queries_keys(x, ctx)
        return recur(q, ctx.mask(k), ctx.mask(v), fixed_decay(self.log_decay(q), q, ctx), ctx, cache)

    def log_decay(self, q: Tensor) -> Tensor:
        """`log gamma_h`, `[H]` in fp32 (fp64 beside fp64), on q's device."""
        heads = torch.arange(self.heads, dtype=wide_dtype(q), device=q.device)
        return torch.log1p(-torch.exp2(-5 - heads))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.key_dim, self.value_dim)


MODULE = Retention
