"""Linformer (Wang et al. 2020, arXiv 2006.04768): attention to R learned mixtures of all keys and values.

    o_t = softmax(q_t (E K)^T) (F V),   E and F [R, N],   N the greatest length

Every mixture spans the whole text, so that no token can be predicted: it is for encoders. E and F are shared by all
heads; `share={"mixer.key_mixing": name}` shares them between layers.

B batch, T tokens, R mixtures, G KV heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.softmax import SoftmaxArgs, SoftmaxAttention

EXAMPLE = {"heads": 4, "head_dim": 16, "length": 48, "mixtures": 6}
VARIANTS = {"one": {**EXAMPLE, "separate": False, "kv_heads": 2, "rope": "default"}}


@dataclass(frozen=True, kw_only=True)
class Args(SoftmaxArgs):
    """`length` is N, the most tokens that fit, `mixtures` R; without `separate`, E serves as F too."""

    length: int
    mixtures: int
    separate: bool = True

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(length=self.length, mixtures=self.mixtures)


class Linformer(SoftmaxAttention):
    options = Args
    encoder_only = True
    packed = False

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        self.key_mixing = nn.Embedding(args.length, args.mixtures)
        if args.separate:
            self.value_mixing = nn.Embedding(args.length, args.mixtures)

    def init_weights(self, std: float) -> None:
        """Normal, such that a mixture of N keys is as large as one of them."""
        for module in (self.key_mixing, *([self.value_mixing] if self.args.separate else [])):
            initialization.normal_(module.weight, mean=0.0, std=self.args.length**-0.5)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"length": 512, "mixtures": 256}

    def visible(self, x: Tensor, ctx: Context, cache: LayerCache | None) -> Keys:
        """`[B, R, G, K]` mixtures; a token's share depends on its position, and padding has none."""
        if x.shape[1] > self.args.length:
            raise ValueError(f"the text has {x.shape[1]} tokens; this Linformer mixes at most {self.args.length}")
        k, v = self.keys_values(x, ctx)
        keys = ctx.mask(self.key_mixing(ctx.positions))
        values = ctx.mask(self.value_mixing(ctx.positions)) if self.args.separate else keys
        return Keys(torch.einsum("btr,btgk->brgk", keys, k), torch.einsum("btr,btgk->brgk", values, v))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return 0


MODULE = Linformer
