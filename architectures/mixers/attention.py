"""Softmax attention: multi-head, grouped-query (Ainslie et al. 2023, arXiv 2305.13245), full, windowed or chunked.

B batch, T new tokens, S keys, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.differential import Difference
from zoo.architectures.core.keys import Keys, all_tokens, keep_ring, key_positions, shared_names, to_values
from zoo.architectures.core.mixer import Context, repeat_heads, wide
from zoo.architectures.core.plan import AttentionSpec, MixerPlan, Row
from zoo.architectures.core.softmax import SoftmaxArgs, SoftmaxAttention, attention_rows
from zoo.errors import ZooError
from zoo.kernels.attention import attention

__all__ = ["Args", "Attention", "all_tokens", "keep_ring", "key_positions"]

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"}
VARIANTS = {
    "window": {**EXAMPLE, "window": 4},
    "sinks": {**EXAMPLE, "window": 4, "sinks": 2, "qk_norm": "rms"},
    "chunk": {**EXAMPLE, "chunk": 4},
    "gated": {**EXAMPLE, "output_gate": True, "sink_logits": True, "softcap": 5.0, "temperature": (4.0, 0.5)},
    "differential": {**EXAMPLE, "window": 4, "differential": 0.4},
    "writes": {**EXAMPLE, "writes": "kv"},
    "value_dim": {**EXAMPLE, "value_dim": 24},
}


@dataclass(frozen=True, kw_only=True)
class Args(SoftmaxArgs):
    """The closed list of options of softmax attention, with those of `SoftmaxArgs`.

    `window` counts keys including the query's own; `sinks` leading tokens stay visible beside it; `chunk` attends
    within blocks of that many tokens. `sink_logits` are learned logits, one per head, in the softmax's denominator.
    `differential` is the start of lambda in differential attention (None: plain attention). `writes` is a name under
    which mixer `cross` in later layers finds this layer's keys and values.
    """

    window: int | None = None
    sinks: int = 0
    chunk: int | None = None
    sink_logits: bool = False
    differential: float | None = None
    writes: str | None = None

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        for name in ("window", "chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ZooError(f"{name} was {value}; it must be at least 1")
        if self.window is not None and self.chunk is not None:
            raise ZooError("window and chunk were both given; choose one")
        if self.sinks and self.window is None:
            raise ZooError(f"sinks was {self.sinks} without a window; sinks only matter beside one")
        if self.differential is not None:
            self._check_differential()

    def _check_differential(self) -> None:
        if (self.kv_heads or self.heads) % 2:
            raise ZooError(f"kv_heads was {self.kv_heads or self.heads}; differential attention needs pairs of heads")
        for name in ("sink_logits", "value_dim"):
            if getattr(self, name):
                raise ZooError(f"{name} and differential were both given; choose one")


class Attention(SoftmaxAttention):
    options: ClassVar[type[mixer.Args]] = Args
    keeps_softmax = True

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        if args.sink_logits:
            self.sinks = nn.Parameter(torch.zeros(self.heads))
        if args.differential is not None:
            self.difference = Difference(self.head_dim, args.differential)

    def init_weights(self, std: float) -> None:
        if self.args.sink_logits:
            initialization.zeros_(self.sinks)
        if self.args.differential is not None:
            self.difference.reset()

    @classmethod
    def layer_type_of(cls, args: Mapping[str, Any]) -> str:
        return "sliding_attention" if args.get("window") else "full_attention"

    @classmethod
    def writes_of(cls, args: Args) -> tuple[str, ...]:
        return () if args.writes is None else shared_names(args.writes)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        if not cls.makes_keys:
            return super().from_attention(spec, heads)
        if heads is not None:
            raise ZooError("mixer 'attention' keeps all heads of a layer; heads cannot be chosen")
        rows = attention_rows(spec)
        rows += (Row(source="sinks", target="sinks"),) if spec.args.get("sink_logits") else ()
        return MixerPlan(args=dict(spec.args), rows=rows, inits=())

    @property
    def recent(self) -> int | None:
        local = self.args.window or self.args.chunk
        return None if local is None else local - 1

    def attend(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        """`[B, T, H, K]`, or `[B, T, H / 2, 2 K]` when differential."""
        mask = dict(window=self.args.window, sink_tokens=self.args.sinks, chunk=self.args.chunk)
        sinks = wide(self.sinks) if self.args.sink_logits else None
        run: Any = partial(attention, sink_logits=sinks, **mask, **self.call(keys, ctx))
        attend = run if self.args.differential is None else partial(self.difference, attend=run)
        o: Tensor = attend(q, keys.k, keys.v)
        return o

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        if cache is not None or self.args.differential is not None:
            return super().mix_values(x, v, ctx, cache)
        k = repeat_heads(self.keys_values(x, ctx)[0], self.heads // self.kv_heads)
        at = None if ctx.padding_mask is None else (ctx.positions, key_positions(ctx))
        return self.attend(self.queries(x, ctx)[0], Keys(k, v, *(at or ())), ctx)

    def written(self, keys: Keys) -> dict[str, Tensor]:
        return {} if self.args.writes is None else to_values(self.args.writes, keys)


MODULE = Attention
