"""FlexPrefill: prefill by patterns and budgets that heads take from the text (Lai et al. 2025, arXiv 2502.20766).

    a = softmax over blocks of scale mean(q) . mean(k)       q the queries of the last block, k the keys of each block
    t = mean over q of softmax(scale q k^T), summed in blocks of keys

Where sqrt(JSD(a, t)) < tau the pooled estimate can be trusted and the head is query-aware: of all pairs of blocks the
fewest are read whose softmax over blocks of scale mean(q) . mean(k) holds gamma of the whole. Otherwise its keys and
its distances are those that the last queries attend to most, the fewest of each that hold gamma of their attention.

`budget={"mass": gamma}`; a budget in blocks takes as many of the same order, for each block of queries, a quarter for
verticals where the head is not query-aware. A slash, a diagonal of width 1, is widened to the blocks that it crosses.
Own blocks are read always. Decode is dense.

B batch, T new tokens, H query heads, N key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.block_lists import Span, by_sequence, check_block, cut_keys, mean, span_of
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import repeat_heads
from zoo.architectures.core.sparse import Method, SparseArgs, SparseAttention, View
from zoo.architectures.core.stripes import Pattern, Stripes, pooled_weights, ranks, read, stripes
from zoo.errors import ZooError

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "block": 16, "min_budget": 4, "budget": 1.0}
VARIANTS = {
    "gamma": {**EXAMPLE, "budget": {"mass": 0.9}},
    "query_aware": {**EXAMPLE, "budget": {"mass": 0.7}, "tau": 1.0},
    "small": {**EXAMPLE, "budget": 32, "tau": 0.2},
}
SHARE = 0.25  # of a budget in blocks, for verticals


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`tau`: how far the estimate of a query-aware head may lie from the truth, 0 (no head is) to 1 (all are).
    `min_budget` keys and distances are read at least where the budget goes by mass. `block` tokens of a block, 1 or 16
    to 128."""

    budget: Any = field(default_factory=lambda: {"mass": 0.9})
    block: int = 128
    tau: float = 0.1
    min_budget: int = 512

    @property
    def block_size(self) -> int:
        return self.block

    def check_method(self) -> None:
        check_block("block", self.block)
        check_sizes(min_budget=self.min_budget)
        if not 0 <= self.tau <= 1:
            raise ZooError(f"tau was {self.tau}; it must be 0 to 1")
        super().check_method()


class FlexPrefill(Method):
    phases = ("prefill",)
    name = "flexprefill"

    def prefill(self, view: View) -> Tensor:
        return by_sequence(self.read, view)

    def read(self, view: View) -> Tensor:
        """`[B, T, H, V]` of sequences that are not packed."""
        args = self.args
        with torch.no_grad():
            span = span_of(view)
            mass = stripes(view, span, args.block)
            trusted = divergence(*distributions(view, span, mass.vertical, args.block)) < args.tau
            share = torch.where(trusted, 0.0, SHARE).double()
            pattern = Pattern(mass, Stripes(*map(ranks, mass)), share, trusted, args.min_budget)
        return read(view, pattern, args.schedule, args.block)


def distributions(view: View, span: Span, vertical: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The estimate a and the truth t, each `[B, H, N]`, of the last `block` queries' attention to the blocks of keys;
    `vertical [B, H, S]`, the attention that each key gets from them."""
    heads, tokens = view.q.shape[2], min(block, view.q.shape[1])
    known = span.queries[:, -tokens:] >= 0
    q = mean(view.q[:, -tokens:].masked_fill(~known[..., None, None], 0.0)[:, None], known[:, None])
    k = repeat_heads(mean(*cut_keys(view, span, block)), heads // view.k.shape[2])
    visible = torch.arange(k.shape[1], device=k.device) * block <= span.last[:, None]
    estimate = pooled_weights(q, k, visible[:, None], view.factor)[:, :, 0]
    truth = F.pad(vertical, (0, -vertical.shape[2] % block)).unflatten(2, (-1, block)).sum(3)
    return estimate, truth / truth.sum(2, keepdim=True).clamp(min=torch.finfo(truth.dtype).tiny)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """The root of the Jensen-Shannon divergence of distributions along the last axis."""
    middle = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny)
    both = torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)
    return (both.sum(-1) / 2).clamp(min=0).sqrt()


class FlexPrefillAttention(SparseAttention):
    options = Args
    method = FlexPrefill


MODULE = FlexPrefillAttention
