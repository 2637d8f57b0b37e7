"""Longformer: a window and a few global tokens (Beltagy et al. 2020, arXiv 2004.05150).

    A_i = {j : |i - j| <= window / 2}  and  {j < g}     queries, keys and values by q_proj, k_proj, v_proj
    A_i = all tokens                   for i < g         by projections of their own, global_q_proj and so on

The first g = `global_tokens` tokens (a classification token, a question) see all and are seen by all. Every token sees
both sides: it is for encoders.

B batch, T tokens, D hidden size, H query heads, G KV heads, K head dimension, g global tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, grouped
from zoo.architectures.core.rope import apply_rope
from zoo.architectures.core.softmax import SoftmaxArgs, SoftmaxAttention
from zoo.errors import ZooError
from zoo.kernels.attention import attention

EXAMPLE = {"heads": 4, "head_dim": 16, "window": 4, "global_tokens": 2}
VARIANTS = {"several": {**EXAMPLE, "window": 2, "global_tokens": 3, "kv_heads": 2, "rope": "default", "q_bias": True}}


@dataclass(frozen=True, kw_only=True)
class Args(SoftmaxArgs):
    """`window` tokens around the own one, half of them on each side."""

    window: int
    global_tokens: int = 1

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(window=self.window, global_tokens=self.global_tokens)
        if self.window % 2:
            raise ZooError(f"window was {self.window}; it must be even, as half of it lies on each side")
        if self.qk_norm is not None or self.output_gate or self.temperature is not None:
            raise ZooError("qk_norm, output_gate or temperature was given; Longformer has none of them")


class Longformer(SoftmaxAttention):
    options = Args
    encoder_only = True
    packed = False

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        for name in ("q", "k", "v"):
            own = self.get_submodule(f"{name}_proj")
            assert isinstance(own, nn.Linear)
            made = nn.Linear(own.in_features, own.out_features, bias=own.bias is not None)
            self.add_module(f"global_{name}_proj", made)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"window": 512}

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        count, keys = self.args.global_tokens, self.visible(x, ctx, None)
        local: dict[str, Any] = dict(window=self.args.window // 2 + 1, sink_tokens=count)
        o = attention(self.queries(x, ctx)[0], keys.k, keys.v, **local, **self.call(keys, ctx))
        place = ctx.positions[..., None, None]
        seeing_all = self.seeing_all(x, ctx, keys.k_positions).take_along_dim(place.clamp(max=count - 1), 1)
        y: Tensor = self.o_proj(torch.where(place < count, seeing_all, o).flatten(-2))
        return y

    def seeing_all(self, x: Tensor, ctx: Context, positions: Tensor | None) -> Tensor:
        """`[B, g, H, K]` of the tokens at positions 0 to g - 1; of a shorter text some that are not used."""
        first = (
            torch.zeros_like(x[:, :1, 0].long())
            if ctx.padding_mask is None
            else ctx.padding_mask.int().argmax(1)[:, None]
        )
        slots = (first + torch.arange(self.args.global_tokens, device=x.device)).clamp(max=x.shape[1] - 1)[..., None]
        tables = dict(ctx.ropes)
        asked = {name: tuple(part.take_along_dim(slots, 1) for part in table) for name, table in tables.items()}
        q = self._turn("q", x.take_along_dim(slots, 1), self.heads, asked)
        k = self._turn("k", x, self.kv_heads, tables)
        v = grouped(self.get_submodule("global_v_proj")(x), self.kv_heads)
        kind: dict[str, Any] = dict(scale=self.args.scale, softcap=self.args.softcap)
        o: Tensor = attention(
            q, k, v, causal=False, k_positions=positions, backend="eager" if ctx.eager else None, **kind
        )
        return o

    def _turn(self, name: str, x: Tensor, heads: int, tables: Any) -> Tensor:
        x = grouped(self.get_submodule(f"global_{name}_proj")(x), heads)
        return x if self.args.rope is None else apply_rope(x, tables[self.args.rope], self.pairing)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return 0


MODULE = Longformer
