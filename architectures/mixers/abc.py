"""Attention with bounded-memory control (Peng et al. 2021, arXiv 2110.02488): softmax over M slots, each an average of
all keys (and values) so far.

    Kt_t = sum_{s <= t} p_ts^T k_s,   Vt_t = sum_{s <= t} p_ts^T v_s,   o_t = softmax(q_t Kt_t^T / sqrt(K)) Vt_t
    p_ts = exp(x_s W) / sum_{r <= t} exp(x_r W),   one weight per slot (the learned control, ABC-MLP)

B batch, T new tokens, H heads, M slots, K key and V value head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.features import running_peak
from zoo.architectures.core.linear import check_sizes, recurrent_bytes
from zoo.architectures.core.mixer import Context, grouped, wide
from zoo.architectures.core.output import GatedOutput, OutputArgs
from zoo.architectures.core.recurrent import scanned
from zoo.architectures.core.slots import slot_attention, slot_bytes

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24, "slots": 12}
VARIANTS = {"gated": {**EXAMPLE, "rope": "default", "gate": "silu", "norm": True}}


@dataclass(frozen=True, kw_only=True)
class Args(OutputArgs):
    """`slots` is M. The published layer is the default; a rotary table, an output gate and a norm may be added."""

    slots: int = 64
    gate: str | None = None
    norm: bool = False

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(slots=self.slots)


class BoundedMemoryControl(GatedOutput):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.key_dim, self.value_dim = args, args.head_dim, args.value_dim or args.head_dim
        self.make_projections(config, args, self.value_dim)
        self.make_output(config, args, self.value_dim)
        self.slot_proj = nn.Linear(config.hidden_size, args.heads * args.slots, bias=False)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        q, k, v = self.expanded_qkv(x, ctx)
        logits = wide(self.slot_proj(x))
        peak, decay = running_peak(logits, ctx, cache)
        write = ctx.mask((logits - peak).exp())
        total = scanned(write, decay, ctx, None if cache is None else cache.view("total"))
        total = total.clamp(
            min=torch.finfo(total.dtype).tiny
        )  # before the first token, when the row starts with padding
        write, decay, total = (grouped(part, self.heads) for part in (write, decay, total))
        return self.finish(slot_attention(q, k, v, write.to(v.dtype), decay, ctx, cache, scale=None, total=total), x)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        slots = self.args.slots
        return slot_bytes(self.heads, slots, self.key_dim, self.value_dim) + 2 * recurrent_bytes(self.heads, slots, 1)


MODULE = BoundedMemoryControl
