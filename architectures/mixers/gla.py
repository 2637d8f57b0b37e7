"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635): a data-dependent decay per key channel.

    S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t,   o_t = q_t S_t,   g_t = logsigmoid(x_t W1 W2 + b) / 16

B batch, T new tokens, H heads, K key and V value head dimension, R rank of the decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import (
    check_sizes,
    check_width,
    decay_biases,
    decay_rates,
    projection_args,
    recur,
    recurrent_bytes,
)
from zoo.architectures.core.mixer import Context, grouped, keep_fp32, wide
from zoo.architectures.core.output import OPEN_GATE, SCALE, GatedOutput, OutputArgs, open_gate
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan, Start
from zoo.architectures.core.recurrent import ConvStates, transferred_rows
from zoo.errors import ZooError

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24}
FEATURE_MAPS = (None, "softmax")


@dataclass(frozen=True, kw_only=True)
class Args(OutputArgs):
    """The published layer is the default; conversion from attention uses the other options.

    `decay_rank` is R and `decay_divisor` the 16 above; `feature_map` "softmax" makes queries and keys distributions
    over their channels (Lan et al. 2025, arXiv 2503.01496); `conv` is the width of short convolutions on q, k and v
    (0: none), followed by `conv_activation`; `scale` is the query scale (None: `head_dim ** -0.5`).
    """

    decay_rank: int = 16
    decay_divisor: float = 16.0
    feature_map: str | None = None
    conv: int = 0
    conv_activation: str | None = "silu"
    scale: float | None = None

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(decay_rank=self.decay_rank)
        if self.decay_divisor <= 0:
            raise ZooError(f"decay_divisor was {self.decay_divisor}; it must be positive")
        if self.feature_map not in FEATURE_MAPS:
            raise ZooError(f"feature_map {self.feature_map!r} is unknown; it must be softmax, or null for none")
        check_width(self.conv, self.conv_activation)


class GatedLinearAttention(GatedOutput):
    options = Args
    starts = (
        Start(target="decay_bias", means="rate", form=lambda rates, args: decay_biases(rates, args.decay_divisor)),
        SCALE,
    )

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.key_dim, self.value_dim = args, args.head_dim, args.value_dim or args.head_dim
        self.make_projections(config, args, self.value_dim)
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.decay_down = nn.Linear(config.hidden_size, args.decay_rank, bias=False)
        self.decay_up = nn.Linear(args.decay_rank, keys, bias=False)
        self.decay_bias = keep_fp32(nn.Parameter(torch.zeros(keys, dtype=torch.float32)))
        widths = {"q": keys, "k": keys, "v": values}
        self.convs = ConvStates(widths, args.conv, args.conv_activation if args.conv else None)
        self.make_output(config, args, self.value_dim)

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        initialization.zeros_(self.decay_bias)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        count, d = spec.heads if heads is None else len(heads), spec.head_dim
        args = projection_args(spec, count) | {"feature_map": "softmax"} | OPEN_GATE
        rates = decay_rates(count, spec.max_position)
        inits = [
            Init(target="decay_down.weight", shape=(16, spec.hidden_size), kind="normal", options={"std": 0.02}),
            Init(target="decay_up.weight", shape=(count * d, 16), kind="normal", options={"std": 0.02}),
            Init(
                target="decay_bias",
                shape=(count * d,),
                kind="values",
                options={"values": decay_biases(rates, 16.0).repeat_interleave(d).tolist()},
                fp32=True,
            ),
            *open_gate(count, d, spec.hidden_size),
        ]
        return MixerPlan(args=args, rows=transferred_rows(spec, heads), inits=tuple(inits))

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        v = grouped(self.convs("v", ctx.mask(self.v_proj(x)), ctx, cache), self.heads)
        return self.finish(self.mix_values(x, v, ctx, cache), x)

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        projections = (("q", self.q_proj), ("k", self.k_proj))
        q, k = (grouped(self.convs(n, ctx.mask(p(x)), ctx, cache), self.heads) for n, p in projections)
        q, k = self.rotated(q, k, ctx)
        if self.args.feature_map == "softmax":
            q, k = (wide(part).softmax(-1).to(x.dtype) for part in (q, k))
        return recur(q, ctx.mask(k), ctx.mask(v), self._decay(x, ctx), ctx, cache, scale=self.args.scale)

    def _decay(self, x: Tensor, ctx: Context) -> Tensor:
        """Log decay `[B, T, H, K]` in fp32; padding does not forget."""
        logits = wide(self.decay_up(self.decay_down(x))) + wide(self.decay_bias)
        return ctx.mask(grouped(F.logsigmoid(logits) / self.args.decay_divisor, self.heads))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.key_dim, self.value_dim) + self.convs.state_bytes(itemsize)


MODULE = GatedLinearAttention
