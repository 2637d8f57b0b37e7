"""Lists of key blocks for `block_sparse_attention`, by estimates that never form all Tq x Tk scores.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K head width; Hs heads of the lists, G query heads of
each key head; Nq query blocks, R of a slice, M queries of a block; Nk key blocks, S listed ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.block_sparse_attention import triton_launch, triton_select
from zoo.kernels.block_sparse_attention.budget import BudgetSchedule
from zoo.kernels.block_sparse_attention.rows import Rows, place_queries, query_blocks
from zoo.kernels.block_sparse_attention.scores import check_pooled, check_score, estimate, pool_keys, pool_queries
from zoo.kernels.block_sparse_attention.validate import check_size, check_tokens

LIMIT = 1 << 24  # estimates at a time
HEADS = ("kv", "query")


@dataclass(frozen=True)
class Selection:
    """The options of one call of `select_blocks`."""

    query_block: int
    block: int
    score: str
    stride: int
    heads: str
    causal: bool
    local: int
    sink: int

    @property
    def weighs(self) -> bool:
        """Whether estimates are weights already, of keys that no query must not see."""
        return self.score not in ("mean", "bounds")

    @property
    def piece(self) -> int:
        """Tokens of a piece of pooled keys."""
        return self.stride if self.score == "antidiagonal" else self.block


@torch.no_grad()
def select_blocks(
    q: Tensor, k: Tensor, budget: BudgetSchedule | int, *, query_block: int, block: int, score: str = "mean",
    stride: int = 8, heads: str = "kv", causal: bool = True, local: int = 1, sink: int = 0,
    q_positions: Tensor | None = None, starts: Tensor | None = None, scale: float | None = None,
    cu_seqlens: Tensor | None = None, pooled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The key blocks that each query block should attend, in ascending order.

    With `causal`, blocks that begin after the last query of a query block are never listed, and those that hold its
    queries (its own) only by `local`: "mean" and "bounds" do not score them, as they may hold keys to come.

    Args:
        q: [B, Tq, H, K]; k: [B, Tk, Hk, K], one dtype. Blocks, `q_positions`, `starts` and `cu_seqlens` are those of
            `block_sparse_attention`.
        budget: how many blocks to list, those of `local` and `sink` counted; these are listed even beyond it.
        score: "mean", "bounds" or "antidiagonal"; `zoo.kernels.block_sparse_attention.scores` defines them.
        stride: of "antidiagonal"; it must divide query_block and block.
        heads: "kv" lists for each key head, by the mean over its query heads of softmax over blocks; "query" for each.
        local: the own blocks and local - 1 before them are listed (without `causal` also after them); 0 lists none.
        sink: the first `sink` blocks are listed.
        pooled: `pool_keys` of the keys with this score and pieces of `block` (of "antidiagonal": `stride`) tokens,
            where it is known already, in fp32 (fp64) or q's dtype; k then gives its shape alone.

    Returns:
        blocks [B, Hs, Nq, S] and counts [B, Hs, Nq], int32; Hs is Hk or H; entries beyond the counts are -1.

    Raises:
        ValueError: a shape, dtype or option is wrong.
    """
    q, k = checks.autocast(q, k)
    checks.check_keys(q, k, k)
    made = Selection(query_block, block, score, stride, heads, causal, local, sink)
    budget = BudgetSchedule(fixed=budget) if isinstance(budget, int) else budget
    check_tokens(q, k, q_positions, starts, cu_seqlens)
    _check(made, budget)
    check_score(score)
    factor = checks.default_scale(scale, q) / (stride if score == "antidiagonal" else 1)
    if score == "bounds" and factor <= 0:
        raise ValueError(f"scale is {factor}; bounds need it to be positive")
    if not k.shape[1]:
        return _nothing(q, q.shape[2] if heads == "query" else k.shape[2], query_block, cu_seqlens)
    if pooled is not None:
        check_pooled(pooled, k, score, made.piece, query_blocks(k.shape[1], made.piece, cu_seqlens))
    with checks.autocast_off(q):
        if triton_select.supports(q, k, made, pooled, cu_seqlens is not None) is None:
            numbers, entries, options = _options(q, k, budget, made)
            tensors, each = (q, k, pooled, q_positions, starts, cu_seqlens, numbers), heads == "query"
            sizes = (query_block, stride, entries, factor)
            blocks, counts = triton_select.SELECT(*tensors, score, each, *sizes, *options)
            return _trim(blocks, counts, budget)
        if pooled is None:
            pooled = pool_keys(k, size=made.piece, score=score, starts=starts, cu_seqlens=cu_seqlens)
        pooled = pooled.to(checks.state_dtype(q.dtype))
        found, places = place_queries(q, k, query_block, q_positions, starts, cu_seqlens)
        first, lengths = _sequences(found, k, made.piece, starts, cu_seqlens)
        slices = [
            _choose(_scores(q, pooled, factor, found, places, first, lengths, part, made, -(-k.shape[1] // made.piece)),
                    places[:, part], lengths[:, part], budget, made)
            for part in _parts(q, k, made, found)
        ]  # fmt: skip
    blocks, counts = (torch.cat(x, 2) for x in zip(*slices, strict=True))
    return _trim(blocks, counts, budget)


@torch.no_grad()
def choose_blocks(
    weights: Tensor, q: Tensor, k: Tensor, budget: BudgetSchedule | int, *, query_block: int, block: int,
    causal: bool = True, local: int = 1, sink: int = 0, q_positions: Tensor | None = None,
    starts: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The choice of `select_blocks` by weights that the caller brings, of a learned gate or a compressed branch.

    Args:
        weights: [B, Hs, Nq, Nk], fp32 (fp64), of each key block of the query block's own sequence, at least 0 where
            `budget` goes by mass; Nk is Tk / block rounded up. They may say nothing of keys that a query must not see:
            own blocks are weighed as others are. What of them names no block to choose from is not read.
        q, k: [B, Tq, H, K] and [B, Tk, Hk, K], for their shapes; Hs is any number of heads.

    Returns and raises as `select_blocks` does.
    """
    made = Selection(query_block, block, "given", 1, "kv", causal, local, sink)
    checks.check_keys(q, k, k)
    budget = BudgetSchedule(fixed=budget) if isinstance(budget, int) else budget
    check_tokens(q, k, q_positions, starts, cu_seqlens)
    _check(made, budget)
    checks.check_shape("weights", weights, None, "B Hs Nq Nk")
    shape = (q.shape[0], weights.shape[1], query_blocks(q.shape[1], query_block, cu_seqlens), -(-k.shape[1] // block))
    checks.check_gate("weights", weights, q, shape, "B Hs Nq Nk")
    if not k.shape[1]:
        return _nothing(q, shape[1], query_block, cu_seqlens)
    if shape[3] <= triton_select.LONGEST and triton_launch.reason(weights) is None:
        numbers, entries, options = _options(q, k, budget, made)
        tensors = (weights, q, q_positions, starts, cu_seqlens, numbers)
        blocks, counts = triton_select.CHOOSE(*tensors, k.shape[1], query_block, entries, *options)
        return _trim(blocks, counts, budget)
    found, places = place_queries(q, k, query_block, q_positions, starts, cu_seqlens)
    lengths = _sequences(found, k, block, starts, cu_seqlens)[1]
    return _trim(*_choose(weights[:, :, None], places, lengths, budget, made), budget)


def refine(blocks: Tensor, counts: Tensor | None, factor: int) -> tuple[Tensor, Tensor | None]:
    """Lists of blocks `factor` times smaller that name the same keys: blocks of 512 as four of 128 each."""
    check_size("factor", factor, 1)
    parts = torch.arange(factor, device=blocks.device, dtype=blocks.dtype)
    return (blocks[..., None] * factor + parts).flatten(-2), None if counts is None else counts * factor


def _nothing(q: Tensor, heads: int, size: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The lists of packed sequences that have no token."""
    counts = q.new_zeros(1, heads, query_blocks(0, size, cu_seqlens), dtype=torch.int32)
    return counts.new_full((*counts.shape, 1), -1), counts


def _trim(blocks: Tensor, counts: Tensor, budget: BudgetSchedule) -> tuple[Tensor, Tensor]:
    """As int32. By mass any list may be as long as there are blocks: cut to the longest, where it can be read."""
    if budget.mass is not None and checks.readable(blocks):
        blocks = blocks[..., : max(1, int(counts.max()))]
    return blocks.int().contiguous(), counts.int()


def _check(made: Selection, budget: object) -> None:
    if not isinstance(budget, BudgetSchedule):
        raise ValueError(f"budget is {budget!r}; it must be a BudgetSchedule or an integer")
    for name, low in (("query_block", 1), ("block", 1), ("stride", 1), ("local", 0), ("sink", 0)):
        check_size(name, getattr(made, name), low)
    if not isinstance(made.causal, bool):
        raise ValueError(f"causal is {made.causal!r}; it must be True or False")
    if made.heads not in HEADS:
        raise ValueError(f"heads is {made.heads!r}; it must be one of {', '.join(HEADS)}")
    if made.score == "antidiagonal" and (made.query_block % made.stride or made.block % made.stride):
        raise ValueError(
            f"stride is {made.stride}; it must divide query_block {made.query_block} and block {made.block}"
        )


def _entries(budget: BudgetSchedule, made: Selection, count: int) -> int:
    """The length of lists of `count` blocks."""
    forced = made.sink + made.local + (made.query_block + made.block - 2) // made.block
    forced += 0 if made.causal else made.local
    return max(1, min(max(budget.width(count), forced), count))


def _options(q: Tensor, k: Tensor, budget: BudgetSchedule, made: Selection) -> tuple[Tensor | None, int, Any]:
    """For the kernels: the budget of every number of visible blocks unless it is fixed or by mass, the length of the
    lists, and a `triton_select.Choice`."""
    count, most = -(-k.shape[1] // made.block), budget.most or 1 << 30
    numbers, fixed = None, 0
    if budget.fixed is not None:
        fixed = min(max(budget.fixed, budget.least), most)
    elif budget.mass is None:
        visible = torch.arange(count + 1, device=q.device)
        numbers = budget.counts(visible, visible).int()
    mass = 0.0 if budget.mass is None else budget.mass * (1 - 1e-9)
    limits = (fixed, min(budget.least, 1 << 30), min(most, 1 << 30), mass)
    edges = (min(made.local, 1 << 29), min(made.sink, 1 << 29))
    return numbers, _entries(budget, made, count), (made.block, count, made.causal, *edges, *limits)


def _parts(q: Tensor, k: Tensor, made: Selection, found: Rows) -> Iterator[slice]:
    """Slices of the query blocks."""
    pooled = {"mean": 1, "bounds": made.query_block, "antidiagonal": made.query_block // made.stride}[made.score]
    one = q.shape[0] * q.shape[2] * (pooled * -(-k.shape[1] // made.piece) + made.query_block * q.shape[3])
    rows = max(1, LIMIT // one)
    count = found.tokens.shape[1]
    return (slice(begin, min(begin + rows, count)) for begin in range(0, count, rows))


def _sequences(
    found: Rows, k: Tensor, piece: int, starts: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Of each query block's sequence the first piece, where it is not 0, and the keys, both [B, Nq]."""
    if cu_seqlens is not None:
        counts = (cu_seqlens.long().diff() + piece - 1) // piece
        return (counts.cumsum(0) - counts)[found.sequence], found.length
    length = torch.full_like(found.begin, k.shape[1])
    return None, length if starts is None else length - starts.long()[:, None]


def _scores(
    q: Tensor, pooled: Tensor, factor: float, found: Rows, places: Tensor, first: Tensor | None, lengths: Tensor,
    part: slice, made: Selection, pieces: int,
) -> Tensor:  # fmt: skip
    """[B, Hk, G, R, Nk] of some query blocks: scores, or of "antidiagonal" weights."""
    (b, tq), tokens, at = q.shape[:2], found.tokens[:, part], places[:, part]
    index = (torch.arange(b, device=q.device)[:, None, None] * tq + tokens).flatten()
    queries = q.flatten(0, 1).index_select(0, index).view(*tokens.shape, *q.shape[2:]).to(pooled.dtype)
    scores = factor * estimate(pool_queries(queries, at >= 0, made.score, made.stride), pooled)
    piece = torch.arange(pieces, device=q.device)
    if first is not None:  # those of all sequences are there: take the own one's
        own = (first[:, part, None] + piece).clamp(max=pooled.shape[1] - 1)
        scores = scores.gather(-1, own[:, None, None, :, None].expand(*scores.shape[:-1], -1))
    if made.score == "bounds":
        return scores.masked_fill((at < 0)[:, None, None, :, :, None], -torch.inf).amax(4)
    if made.score == "mean":
        return scores.squeeze(4)
    last = at.unflatten(2, (-1, made.stride)).amax(3)[..., None]  # [B, R, P, 1]
    seen = (piece * made.stride < lengths[:, part, None, None]) & (last >= 0)
    if made.causal:
        seen = seen & (piece * made.stride <= last)
    weights = _softmax(scores, seen[:, None, None]).sum(4)
    each = made.block // made.stride
    return F.pad(weights, (0, -pieces % each)).unflatten(-1, (-1, each)).sum(-1)


def _softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Over the last axis; zeros where nothing is seen."""
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)


def _choose(
    scores: Tensor, places: Tensor, lengths: Tensor, budget: BudgetSchedule, made: Selection
) -> tuple[Tensor, Tensor]:
    """Blocks [B, Hs, R, S] and counts [B, Hs, R] by scores [B, Hk, G, R, Nk]."""
    (groups, count), block = (scores.shape[2], scores.shape[4]), made.block
    number = torch.arange(count, device=scores.device)
    last = places.amax(2, keepdim=True)  # [B, R, 1]
    begin, end = places[..., :1] // block, last // block
    there = (number * block < lengths[..., None]) & (last >= 0)
    there = there & (number <= end) if made.causal else there
    own = (number >= begin) & (number <= end)
    kept = (number > begin - made.local) & (number < end + (1 if made.causal else made.local)) & (made.local > 0)
    kept = there & (kept | (number < made.sink))
    there = there & ((number < begin) | kept) if made.causal else there
    scored = there & ~own if made.causal and not made.weighs else there
    each = made.heads == "query"
    if not made.weighs and (budget.mass is not None or (groups > 1 and not each)):
        scores = _softmax(scores, scored[:, None, None])
    scores = scores.flatten(1, 2) if each else scores.mean(2)
    kept, there, scored = (x[:, None].expand_as(scores) for x in (kept, there, scored))
    ranks, order = (
        scores.masked_fill(~there, -torch.inf).masked_fill(kept, torch.inf).sort(dim=-1, descending=True, stable=True)
    )
    weights = scores.masked_fill(~scored, 0.0).gather(-1, order)
    visible, forced = there.sum(-1), kept.sum(-1)
    counts = torch.minimum(torch.maximum(budget.counts(visible, weights), forced), visible)
    order = order[..., : _entries(budget, made, count)]
    order = order.masked_fill(torch.arange(order.shape[-1], device=order.device) >= counts[..., None], count)
    order = order.sort(-1).values
    return order.masked_fill(order == count, -1), counts
