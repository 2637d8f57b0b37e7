"""XAttention: prefill reads the blocks whose antidiagonals score most (Xu et al. 2025, arXiv 2503.16428).

    tile (a, c)     scale / s sum over t of q_{a s + s - 1 - t} . k_{c s + t}      the antidiagonal of s x s scores
    block (r, b)    sum over tiles (a, c) of softmax over c

An antidiagonal crosses every vertical and every slash of its tile. Each block of queries reads the fewest blocks of
keys that hold the threshold's share of the whole, the first block and its own ones always. Decode is dense.

B batch, T new tokens, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.block_lists import Lists, check_block, join
from zoo.architectures.core.sparse import Method, SparseArgs, SparseAttention, View
from zoo.errors import ZooError
from zoo.kernels.block_sparse_attention.budget import BudgetSchedule

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "block": 16, "budget": 1.0}
VARIANTS = {
    "small": {**EXAMPLE, "budget": 32, "stride": 4},
    "threshold": {**EXAMPLE, "budget": {"mass": 0.8}, "stride": 16, "block": 32},
    "thresholds": {**EXAMPLE, "thresholds": (0.8, 0.6, 0.8, 1.0)},
}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`budget={"mass": threshold}`, or any other; `thresholds`, one for each query head, in its place. `stride` is the
    width of a tile, and divides the `block` tokens of a block, 16 to 128."""

    budget: Any = field(default_factory=lambda: {"mass": 0.9})
    block: int = 128
    stride: int = 8
    thresholds: tuple[float, ...] | None = None

    @property
    def block_size(self) -> int:
        return self.block

    @property
    def everything(self) -> bool:
        return self.thresholds is None and super().everything

    def check_method(self) -> None:
        check_block("block", self.block)
        if not isinstance(self.stride, int) or self.stride < 1 or self.block % self.stride:
            raise ZooError(f"stride was {self.stride!r}; it must divide the block of {self.block}")
        for threshold in self.thresholds or ():
            if not 0 < threshold <= 1:
                raise ZooError(f"thresholds had {threshold!r}; each must be above 0 and at most 1")
        if self.thresholds is not None and len(self.thresholds) != self.heads:
            raise ZooError(f"thresholds was {self.thresholds}; it must have one for each of {self.heads} heads")
        super().check_method()


class XAttention(Method):
    phases = ("prefill",)
    name = "xattention"

    def prefill(self, view: View) -> Tensor:
        sizes = dict(query_block=self.args.block, block=self.args.block)
        lists = self.choose(view, **sizes)
        return view.attend(lists.blocks, lists.counts, **sizes)

    def choose(self, view: View, **sizes: int) -> Lists:
        """The blocks of keys of each query head."""
        options = dict(score="antidiagonal", stride=self.args.stride, heads="query", sink=1, **sizes)
        if self.args.thresholds is None:
            return Lists(*view.select(self.args.schedule, **options))
        parts, order = [], []
        for threshold in dict.fromkeys(self.args.thresholds):
            heads = [head for head, own in enumerate(self.args.thresholds) if own == threshold]
            parts.append(Lists(*of_heads(view, heads).select(BudgetSchedule(mass=threshold), **options)))
            order += heads
        lists = join(parts)
        back = torch.tensor(order, device=view.q.device).argsort()
        return Lists(lists.blocks[:, back], lists.counts[:, back])


def of_heads(view: View, heads: list[int]) -> View:
    """The view of some query heads, each with a KV head of its own."""
    group = view.q.shape[2] // view.k.shape[2]
    own = [head // group for head in heads]
    return replace(view, q=view.q[:, :, heads], k=view.k[:, :, own], v=view.v[:, :, own])


class XAttentionMixer(SparseAttention):
    options = Args
    method = XAttention


MODULE = XAttentionMixer
