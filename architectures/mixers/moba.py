"""Mixture of block attention (MoBA, Lu et al. 2025, arXiv 2502.13189): each query routes to a few blocks of keys.

    s_i = <q, mean of the keys of block i>
    o = softmax(q K_I^T) V_I       I: the own block, up to the query, and the past ones of the largest s_i

Every query token and head routes by itself, with no parameters, in prefill and decode alike; blocks to come are never
seen. Gradients reach queries and keys through attention alone. The cache notes the blocks' mean keys.

B batch, T new tokens, S keys, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoo.architectures.core.means import means_bytes, piece_means
from zoo.architectures.core.sparse import Method, SparseArgs, SparseAttention, View
from zoo.errors import ZooError

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "block": 16, "budget": 1.0}
VARIANTS = {"small": {**EXAMPLE, "budget": 32}}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`block` tokens of a key block: 1, 16 to 128, or a multiple of 128 up to 4096. The `budget` counts the own block:
    3 of 512 tokens by default."""

    block: int = 512
    budget: Any = 1536

    @property
    def block_size(self) -> int:
        return self.block

    def check_method(self) -> None:
        if self.block != 1 and not 16 <= self.block <= 128 and not (self.block % 128 == 0 and self.block <= 4096):
            raise ZooError(f"block was {self.block}; it must be 1, 16 to 128, or a multiple of 128 up to 4096")
        super().check_method()


class Moba(Method):
    phases = ("prefill", "decode")
    name = "moba"

    def prefill(self, view: View) -> Tensor:
        if self.args.everything:
            return view.dense()
        sizes = dict(query_block=1, block=self.args.block)
        pooled = None if view.notes is None else piece_means(view, self.args.block)
        blocks, counts = view.select(self.args.schedule, score="mean", heads="query", pooled=pooled, **sizes)
        return view.attend(blocks, counts, **sizes)

    decode = prefill


class MobaAttention(SparseAttention):
    options = Args
    method = Moba
    phase_consistent = True

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        noted = means_bytes(length, self.args.block, self.kv_heads, self.head_dim, itemsize)
        return super().state_bytes(length, itemsize) + (0 if self.args.everything else noted)


MODULE = MobaAttention
