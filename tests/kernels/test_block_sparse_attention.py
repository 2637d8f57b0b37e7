"""Attention over listed blocks: against a naive masked softmax written here, dense attention, packing, blind rows."""

from __future__ import annotations

import pytest
import torch
from sparse_calls import inputs, lists, naive

from zoo.kernels import dispatch
from zoo.kernels.attention import PADDING, attention
from zoo.kernels.block_sparse_attention import block_sparse_attention, chunked, query_blocks
from zoo.kernels.block_sparse_attention.lists import first_of_equals

BACKENDS = [name for name in dispatch.backends("block_sparse_attention") if name != "triton"]
SIZES = [(1, 1), (1, 16), (16, 16), (16, 1), (17, 20)]
MASKS = [
    {},
    {"causal": False},
    {"window": 3},
    {"sink_tokens": 4},
    {"window": 5, "sink_tokens": 2, "causal": False},
    {"window": 6, "sink_tokens": 3, "columns": 4},
    {"window": 200, "sink_tokens": 200},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("query_block", "block"), SIZES)
@pytest.mark.parametrize("heads", [2, 4])
def test_equals_naive_softmax(backend, mask, query_block, block, heads, evaluate, assert_close):
    """Values and all gradients, those of lse and bias with them; lists by key head and by query head."""
    mask = dict(mask)
    tensors, given = lists(
        inputs(21, 25), query_block, block, heads=heads, columns=mask.pop("columns", 0), bias=heads == 2
    )
    expected = evaluate(lambda **x: naive(**x, **given, **mask), tensors)
    found = evaluate(block_sparse_attention, tensors, backend=backend, return_lse=True, **given, **mask)
    assert_close(found, expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_blocks(backend, evaluate, assert_close):
    tensors, given = lists(inputs(9, 600), 1, 256, heads=4, entries=2, bias=True)
    expected = evaluate(lambda **x: naive(**x, **given), tensors)
    assert_close(evaluate(block_sparse_attention, tensors, backend=backend, return_lse=True, **given), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("query_block", "block"), SIZES[1::3])
def test_padded_rows_and_positions(backend, mask, query_block, block, evaluate, assert_close):
    """Blocks count from the first real key and query of a row; queries in the middle of a longer cache."""
    mask, starts = dict(mask), [0, 7]
    tensors, given = lists(inputs(19, 30), query_block, block, columns=mask.pop("columns", 0), bias=True)
    pk = [[j - start for j in range(30)] for start in starts]
    for first in (None, [3, -2]):
        pq = [[11 + i - x for i in range(19)] if first is None else [y + i for i in range(19)]
              for x, y in zip(starts, first or starts, strict=True)]  # fmt: skip
        at = {"starts": torch.tensor(starts)} | ({} if first is None else {"q_positions": torch.tensor(pq)})
        expected = evaluate(lambda pq=pq, **x: naive(**x, **given, **mask, pq=pq, pk=pk), tensors)
        found = evaluate(block_sparse_attention, tensors, backend=backend, return_lse=True, **given, **mask, **at)
        assert_close(found, expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("query_block", "block"), SIZES[1::3])
def test_packed_equals_separate(backend, mask, query_block, block, evaluate, assert_close):
    mask, ends = dict(mask), [0, 0, 1, 18, 18, 40]
    cu_seqlens, tensors = torch.tensor(ends, dtype=torch.int32), inputs(40, b=1)
    columns = mask.pop("columns", 0)
    tensors, given = lists(tensors, query_block, block, columns=columns, bias=True, cu_seqlens=cu_seqlens)

    def separate(bias, **tensors):
        results, row = [], 0
        for n, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
            rows = slice(row, row + -(-(b - a) // query_block))
            own = {name: given[name][:, :, rows] for name in ("blocks", "counts")}
            own |= {"columns": given["columns"][n : n + 1]} if columns else {}
            part = {name: x[:, a:b] for name, x in tensors.items()} | {"bias": bias[:, :, rows]}
            results += [naive(**part, **given | own, **mask)] if a < b else []
            row = rows.stop
        return tuple(torch.cat(x, 1) for x in zip(*results, strict=True))

    found = evaluate(
        block_sparse_attention, tensors, backend=backend, return_lse=True, cu_seqlens=cu_seqlens, **given, **mask
    )
    assert_close(found, evaluate(separate, tensors), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [1, 16])
def test_all_blocks_are_dense_attention(backend, causal, block, evaluate, assert_close):
    """Also where only the window, sink tokens or columns hold all keys."""
    tensors = inputs(33)
    expected = evaluate(attention, tensors, causal=causal, return_lse=True, backend="reference")
    every = torch.arange(-(-33 // block)).flip(0).expand(2, 2, 3, -1)
    none = torch.full((2, 2, 3, 1), -1)
    columns = torch.arange(33).expand(2, 2, -1)
    for blocks, more in (
        (every, {}),
        (torch.cat([every, every], -1), {}),
        (none, {"window": 33}),
        (none, {"sink_tokens": 40}),
        (none, {"columns": columns}),
        (every, {"columns": columns, "window": 4, "sink_tokens": 5}),
    ):
        options = {"query_block": 16, "block": block, "causal": causal, "return_lse": True, "backend": backend} | more
        assert_close(evaluate(block_sparse_attention, tensors, blocks=blocks, **options), expected, 1e-10)


@pytest.mark.parametrize("limit", [1, 20_000])
def test_slices_and_long_lists(monkeypatch, limit, evaluate, assert_close):
    """However few query blocks fit into a slice, the result is the same, and it is that of dense attention."""
    monkeypatch.setattr(chunked, "LIMIT", limit)
    tensors = inputs(150, b=1)
    blocks = torch.rand(1, 2, 10, 10).argsort(-1)[..., :6]
    given = {"blocks": blocks, "query_block": 16, "block": 16}
    rows, columns = torch.arange(150)[:, None] // 16, torch.arange(150) // 16
    seen = (blocks[0][:, rows[:, 0]][:, :, None] == columns[None, None, :, None]).any(-1) & (
        torch.arange(150) <= torch.arange(150)[:, None]
    )

    def dense(q, k, v):
        k, v = (x.repeat_interleave(2, 2) for x in (k, v))
        scores = torch.einsum("bihk,bjhk->bhij", q, k) / 6**0.5
        mask = seen.repeat_interleave(2, 0)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
        return torch.einsum("bhij,bjhv->bihv", weights, v)

    assert_close(evaluate(block_sparse_attention, tensors, **given), evaluate(dense, tensors), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_is_blind_to_later_keys(backend):
    tensors, given = lists(inputs(40, b=1), 16, 16, entries=3)
    options = {"window": 3, "columns": torch.tensor([[[30], [2]]]), "sink_tokens": 1, "backend": backend} | given
    before = block_sparse_attention(**tensors, **options)
    later = {name: torch.cat([x[:, :25], torch.randn_like(x[:, 25:])], 1) for name, x in tensors.items()}
    after = block_sparse_attention(**later, **options)
    assert torch.equal(before[:, :25], after[:, :25]) and not torch.equal(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blind_rows_are_zero_with_zero_gradient(backend, dtype, evaluate):
    tensors, _ = lists(inputs(5, dtype=dtype), 1, 16, bias=True)
    counts = torch.tensor([1, 0, 1, 0, 1]).expand(2, 2, -1)
    given = {"blocks": torch.zeros(2, 2, 5, 3, dtype=torch.int64), "counts": counts, "query_block": 1, "block": 16}
    o, lse, dq, *others = evaluate(block_sparse_attention, tensors, backend=backend, return_lse=True, **given).values()
    assert not o[:, 1::2].any() and not dq[:, 1::2].any() and (lse[:, 1::2] == -torch.inf).all()
    assert lse[:, ::2].isfinite().all() and dq[:, 2].any() and all(x.isfinite().all() for x in others)


def test_decoding_equals_the_whole():
    """Query after query over a cache that is longer than what is filled."""
    tensors, given = lists(inputs(40), 1, 16)
    whole = block_sparse_attention(**tensors, **given, window=2)
    cache = {name: torch.cat([tensors[name], torch.full_like(tensors[name], 9.0)], 1) for name in ("k", "v")}
    for i in (0, 17, 39):
        own = given | {name: given[name][:, :, i : i + 1] for name in ("blocks", "counts")}
        at = torch.tensor([i])
        one = block_sparse_attention(tensors["q"][:, i : i + 1], **cache, **own, window=2, q_positions=at)
        torch.testing.assert_close(one, whole[:, i : i + 1])


def test_lse_merges_two_lists():
    tensors, given = lists(inputs(40), 16, 16)
    blocks = torch.arange(3).expand(2, 2, 3, -1)
    given = {"query_block": 16, "block": 16, "return_lse": True}
    o, lse = block_sparse_attention(**tensors, blocks=blocks, **given)
    merged = torch.zeros_like(o)
    for part in (blocks[..., :1], blocks[..., 1:]):
        x, own = block_sparse_attention(**tensors, blocks=part, **given)
        merged = merged + x * (own - lse).exp()[..., None]
    torch.testing.assert_close(merged, o)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_near_fp64(dtype, evaluate, assert_close):
    tensors, given = lists(inputs(64, dtype=dtype), 16, 16)
    exact = {name: x.double() for name, x in tensors.items()}
    found = evaluate(block_sparse_attention, tensors, window=8, **given)
    assert_close(found, evaluate(block_sparse_attention, exact, window=8, **given), 8e-3, 2e-2)


def test_empty_packed_batch():
    cu_seqlens, tensors = torch.zeros(3, dtype=torch.int32), inputs(1, b=1)
    tensors = {name: x[:, :0].requires_grad_() for name, x in tensors.items()}
    blocks = torch.zeros(1, 2, query_blocks(0, 16, cu_seqlens), 1, dtype=torch.int64)
    o = block_sparse_attention(**tensors, blocks=blocks, query_block=16, block=16, cu_seqlens=cu_seqlens)
    assert o.shape == (1, 0, 4, 5)
    o.sum().backward()


def test_autocast():
    tensors, given = lists(inputs(20, dtype=torch.float32), 1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert block_sparse_attention(**tensors, **given).dtype == torch.bfloat16


def test_first_of_equals():
    x = torch.tensor([[3, 1, 3, -1, 1, 1], [0, 0, 0, 0, 0, 2]])
    first = [[True, True, False, True, False, False], [True, False, False, False, False, True]]
    assert first_of_equals(x).tolist() == first


def test_gathered_memory_is_bounded(monkeypatch):
    """No slice computes more scores than its share of 2000 x 2000."""
    sizes = []
    original = chunked.Slice.scores
    monkeypatch.setattr(chunked, "LIMIT", 1 << 18)
    monkeypatch.setattr(chunked.Slice, "scores", lambda *args: sizes.append(original(*args).numel()) or original(*args))
    tensors = inputs(2000, b=1, dtype=torch.float32)
    blocks = torch.randint(0, 32, (1, 2, 2000, 2))
    block_sparse_attention(**tensors, blocks=blocks, query_block=1, block=64)
    assert len(sizes) > 10 and max(sizes) <= 1 << 18 and sum(sizes) == 2000 * 4 * 128


def test_padding_is_that_of_attention(assert_close):
    """A left-padded row beside dense attention with the key positions that say the same."""
    tensors, starts = inputs(20), torch.tensor([0, 6])
    positions = torch.arange(20) - starts[:, None]
    keys = torch.where(positions < 0, PADDING, positions)
    dense = attention(**tensors, q_positions=positions, k_positions=keys, return_lse=True)
    blocks = torch.arange(2).expand(2, 2, 2, -1)
    sparse = block_sparse_attention(**tensors, blocks=blocks, query_block=16, block=16, starts=starts, return_lse=True)
    names = ("o", "lse")
    assert_close(dict(zip(names, sparse, strict=True)), dict(zip(names, dense, strict=True)), 1e-10)
