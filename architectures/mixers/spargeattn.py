"""SpargeAttn: prefill leaves out blocks whose scores are predicted, then seen, to be small (Zhang et al. 2025, arXiv
2502.18137).

    1. A block whose tokens are alike, mean over pairs of cos(x_i, x_j) > theta, is stood for by its mean. Of the key
       blocks that are alike, a block of queries that is reads the fewest that hold tau of the softmax over them of
       scale mean(q) . mean(k). Key blocks and blocks of queries that are not alike are read with everything.
    2. Of the blocks that are left, those are skipped whose scores lie far below larger ones, by
       `zoo.architectures.core.skipping`; without `skip`, none.

Own blocks pass stage 1 always. `budget={"mass": tau}`; a budget in blocks takes as many of those that are alike. Decode
is dense.

B batch, T new tokens, H query heads, K head dimension; R query blocks, N key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.block_lists import (
    Lists,
    Span,
    best,
    by_sequence,
    check_block,
    cut_keys,
    cut_queries,
    enough,
    join,
    listed,
    mean,
    some_heads,
    span_of,
)
from zoo.architectures.core.mixer import repeat_heads, wide
from zoo.architectures.core.skipping import unskipped
from zoo.architectures.core.sparse import Method, SparseArgs, SparseAttention, View
from zoo.errors import ZooError

EXAMPLE = {
    **{"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"},
    **{"query_block": 32, "block": 16, "budget": 1.0},
}
VARIANTS = {
    "tau": {**EXAMPLE, "budget": {"mass": 0.8}, "theta": 0.1},
    "skip": {**EXAMPLE, "skip": -3.0},
    "small": {**EXAMPLE, "budget": 32, "theta": -1.0},
}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`theta`: how alike the tokens of a block must be, -1 (all are) to 1 (none are), keys around the mean of all keys
    if `smooth`; None is as published: 0.6 where the budget goes by mass, -0.1 otherwise. `skip`: the logarithm of a
    weight, beside the largest so far, below which stage 2 skips a block (None: no stage 2). `query_block` and `block`
    tokens of a block of queries and of keys, 1 or 16 to 128."""

    budget: Any = field(default_factory=lambda: {"mass": 0.98})
    query_block: int = 128
    block: int = 64
    theta: float | None = None
    smooth: bool = True
    skip: float | None = None

    @property
    def block_size(self) -> int:
        return self.block

    @property
    def everything(self) -> bool:
        return self.skip is None and super().everything

    def check_method(self) -> None:
        check_block("query_block", self.query_block)
        check_block("block", self.block)
        if self.theta is not None and not -1 <= self.theta <= 1:
            raise ZooError(f"theta was {self.theta}; it must be -1 to 1")
        if self.skip is not None and not self.skip < 0:
            raise ZooError(f"skip was {self.skip}; it must be below 0, or None")
        super().check_method()


class SpargeAttn(Method):
    phases = ("prefill",)
    name = "spargeattn"

    def prefill(self, view: View) -> Tensor:
        return by_sequence(self.read, view)

    def read(self, view: View) -> Tensor:
        """`[B, T, H, V]` of sequences that are not packed."""
        args, span = self.args, span_of(view)
        with torch.no_grad():
            lists = self.predicted(view, span)
            if args.skip is not None:
                lists = unskipped(view, span, lists, args.query_block, args.block, args.skip)
        return view.attend(lists.blocks, lists.counts, query_block=args.query_block, block=args.block)

    def predicted(self, view: View, span: Span) -> Lists:
        """The blocks that stage 1 keeps."""
        args, budget, group = self.args, self.args.schedule, view.q.shape[2] // view.k.shape[2]
        theta = args.theta if args.theta is not None else -0.1 if budget.mass is None else 0.6
        q, known_q = cut_queries(view, span, args.query_block)
        k, known_k = cut_keys(view, span, args.block)
        alike_q = alike(q, known_q) > theta
        alike_k = repeat_heads(alike(around(k, known_k) if args.smooth else k, known_k) > theta, group)
        q, k = mean(q, known_q), repeat_heads(mean(k, known_k), group)
        visible, own = span.seen(args.query_block, args.block, k.shape[1])
        parts = []
        for some in some_heads(view, args.query_block, args.block):
            unlike_k = ~alike_k[:, :, some].transpose(1, 2)[:, :, None]
            candidates = visible[:, None] & ~unlike_k
            scores = view.factor * torch.einsum("brhk,bnhk->bhrn", q[:, :, some], k[:, :, some])
            weights = scores.masked_fill(~candidates, -torch.inf).softmax(-1).masked_fill(~candidates, 0.0)
            order = weights.masked_fill(~candidates, -1.0)
            marked = best(order, enough(order, weights, budget, visible.sum(2)[:, None]))
            marked = marked | own[:, None] | unlike_k | ~alike_q[:, :, some].transpose(1, 2)[..., None]
            parts.append(listed(marked & visible[:, None]))
        return join(parts)


def around(pieces: Tensor, known: Tensor) -> Tensor:
    """`pieces [B, n, M, H, K]` without the mean of all `known [B, n, M]` tokens."""
    pieces = wide(pieces)
    center = mean(pieces.flatten(1, 2)[:, None], known.flatten(1)[:, None])
    return (pieces - center[:, :, None]).masked_fill(~known[..., None, None], 0.0)


def alike(pieces: Tensor, known: Tensor) -> Tensor:
    """`[B, n, H]`: the mean cosine of all pairs of tokens of a block `[B, n, M, H, K]`, a token with itself counted."""
    return mean(F.normalize(wide(pieces), dim=-1), known).square().sum(-1)


class SpargeAttention(SparseAttention):
    options = Args
    method = SpargeAttn


MODULE = SpargeAttention
