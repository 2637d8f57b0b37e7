"""Gated slot attention (Zhang et al. 2024, arXiv 2409.07146): softmax over M slots that each forget by a gate of their
own, as in gated linear attention.

    Kt_t = Diag(a_t) Kt_{t-1} + (1 - a_t)^T k_t,   Vt_t = Diag(a_t) Vt_{t-1} + (1 - a_t)^T v_t
    o_t = softmax(q_t Kt_t^T) Vt_t,   a_t = sigmoid(x_t W_f + b)^(1/8),   q, k, v = silu(x W)
    y_t = norm(silu(o_t)) W_O,   the norm over all heads side by side

B batch, T new tokens, H heads, M slots, K key and V value head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes, decay_biases, decay_rates, projection_args
from zoo.architectures.core.mixer import Context, grouped, keep_fp32, wide
from zoo.architectures.core.output import OPEN_GATE, SCALE, GatedOutput, OutputArgs, open_gate
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan, Start
from zoo.architectures.core.recurrent import transferred_rows
from zoo.architectures.core.slots import slot_attention, slot_bytes
from zoo.errors import ZooError

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24, "slots": 12}
SPREAD = 16.0  # a measured head's slots forget from so many times faster than it to as many times slower


@dataclass(frozen=True, kw_only=True)
class Args(OutputArgs):
    """The published layer is the default; conversion from attention uses the other options.

    `slots` is M and `decay_divisor` the 8 above; `decay_bias` adds b, one number per slot; `activation` is that of
    queries, keys, values and of o_t (silu or None); `scale` multiplies the queries (None: `head_dim ** -0.5`).
    """

    slots: int = 64
    decay_divisor: float = 8.0
    decay_bias: bool = False
    activation: str | None = "silu"
    scale: float | None = 1.0
    gate: str | None = None
    norm_full: bool = True

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(slots=self.slots)
        if self.decay_divisor <= 0:
            raise ZooError(f"decay_divisor was {self.decay_divisor}; it must be positive")
        if self.activation not in (None, "silu"):
            raise ZooError(f"activation {self.activation!r} is unknown; it must be silu, or null for none")


class GatedSlotAttention(GatedOutput):
    options = Args
    starts = (Start(target="decay_bias", means="rate", form=lambda rates, args: slot_biases(rates, args)), SCALE)

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.key_dim, self.value_dim = args, args.head_dim, args.value_dim or args.head_dim
        self.make_projections(config, args, self.value_dim)
        self.make_output(config, args, self.value_dim)
        self.decay_proj = nn.Linear(config.hidden_size, args.heads * args.slots, bias=False)
        if args.decay_bias:
            self.decay_bias = keep_fp32(nn.Parameter(torch.zeros(args.heads, args.slots, dtype=torch.float32)))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.args.decay_bias:
            initialization.zeros_(self.decay_bias)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        count, slots = spec.heads if heads is None else len(heads), int(spec.wanted.get("slots", 64))
        args = projection_args(spec, count) | OPEN_GATE | {"norm_full": False, "slots": slots, "decay_bias": True}
        args |= {"activation": None, "scale": spec.scale}
        divisor = float(spec.wanted.get("decay_divisor", 8.0))
        biases = decay_biases(decay_rates(slots, spec.max_position), divisor).repeat(count).tolist()
        inits = (
            Init(
                target="decay_proj.weight",
                shape=(count * slots, spec.hidden_size),
                kind="normal",
                options={"std": 0.02},
            ),
            Init(target="decay_bias", shape=(count, slots), kind="values", options={"values": biases}, fp32=True),
            *open_gate(count, spec.head_dim, spec.hidden_size),
        )
        return MixerPlan(args=args, rows=transferred_rows(spec, heads), inits=inits)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        v = grouped(self._activated(self.v_proj(x)), self.heads)
        return self.finish(self._activated(self.mix_values(x, v, ctx, cache)), x)

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        q, k = (grouped(self._activated(projection(x)), self.heads) for projection in (self.q_proj, self.k_proj))
        q, k = self.rotated(q, k, ctx)
        decay = self._decay(x, ctx)
        write = -torch.expm1(decay)  # nothing where padding does not forget
        return slot_attention(q, k, v, write.to(v.dtype), decay, ctx, cache, scale=self.args.scale)

    def _activated(self, x: Tensor) -> Tensor:
        return x if self.args.activation is None else F.silu(x)

    def _decay(self, x: Tensor, ctx: Context) -> Tensor:
        """Log decay `[B, T, H, M]` in fp32; padding does not forget."""
        logits = wide(grouped(self.decay_proj(x), self.heads))
        if self.args.decay_bias:
            logits = logits + wide(self.decay_bias)
        return ctx.mask(F.logsigmoid(logits) / self.args.decay_divisor)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return slot_bytes(self.heads, self.args.slots, self.key_dim, self.value_dim)


def slot_biases(rates: Tensor, args: Args) -> Tensor:
    """Biases `[H, M]` under which each head's slots forget at rates about its own, from fast to slow."""
    spread = torch.logspace(math.log2(SPREAD), -math.log2(SPREAD), args.slots, base=2.0, dtype=rates.dtype)
    return decay_biases(rates[:, None] * spread, args.decay_divisor)


MODULE = GatedSlotAttention
