"""Attention over listed blocks: against a naive masked softmax written here, dense attention, packing, blind rows."""

from __future__ import annotations

import pytest
import torch

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


def inputs(tq, tk=None, *, b=2, dtype=torch.float64):
    tk = tk or tq
    return {
        "q": torch.randn(b, tq, 4, 6, dtype=dtype),
        "k": torch.randn(b, tk, 2, 6, dtype=dtype),
        "v": torch.randn(b, tk, 2, 5, dtype=dtype),
    }


def lists(tensors, query_block, block, *, heads=2, entries=3, columns=0, bias=False, cu_seqlens=None):
    """Random lists: repeated blocks, missing ones, empty lists; with columns and a bias on request."""
    (b, tq), tk = tensors["q"].shape[:2], tensors["k"].shape[1]
    shape = (b, heads, query_blocks(tq, query_block, cu_seqlens), entries)
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    made = {"query_block": query_block, "block": block, "blocks": torch.randint(-1, -(-tk // block) + 1, shape)}
    made["counts"] = torch.randint(0, entries + 1, shape[:3])
    if columns:
        made["columns"] = torch.randint(-1, tk + 2, (sequences, heads, columns))
    extra = {"bias": torch.randn(shape, dtype=tensors["q"].dtype)} if bias else {}
    return tensors | extra, made


def sees(i, j, entries, columns, *, block, causal=True, window=0, sink_tokens=0):
    """Whether a query at position i sees the key at j, and the place of the entry whose bias it takes."""
    if i < 0 or j < 0 or (causal and j > i):
        return False, None
    if abs(i - j) < window or j < sink_tokens or j in columns:
        return True, None
    return (True, entries.index(j // block)) if j // block in entries else (False, None)


def naive(q, k, v, bias=None, *, blocks, counts, query_block, block, columns=None, pq=None, pk=None, **mask):
    """One score after another. pq and pk are lists of positions by batch row."""
    (b, tq, h, _), tk, hs = q.shape, k.shape[1], blocks.shape[1]
    pq, pk = pq or [list(range(tk - tq, tk))] * b, pk or [list(range(tk))] * b
    k, v = (x.repeat_interleave(h // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / q.shape[-1] ** 0.5
    seen, shift = torch.zeros(b, hs, tq, tk, dtype=torch.bool), {}
    for n in range(b):
        skipped = sum(i < 0 for i in pq[n])
        for g in range(hs):
            own = [] if columns is None else columns[n, g].tolist()
            for i in range(skipped, tq):
                row = (i - skipped) // query_block
                entries = blocks[n, g, row, : counts[n, g, row]].tolist()
                for j in range(tk):
                    seen[n, g, i, j], at = sees(pq[n][i], pk[n][j], entries, own, block=block, **mask)
                    if at is not None:
                        shift[n, g, i, j] = (n, g, row, at)
    if bias is not None and shift:
        added = torch.zeros(seen.shape, dtype=q.dtype)
        to, source = (torch.tensor(list(x)).unbind(1) for x in (shift, shift.values()))
        scores = scores + added.index_put(to, bias[source]).repeat_interleave(h // hs, 1)
    seen = seen.repeat_interleave(h // hs, 1)
    weights = torch.where(seen, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    total = torch.where(blind, 1.0, total)
    o = torch.einsum("bhij,bjhv->bihv", weights / total, v)
    return o, total.log().masked_fill(blind, -torch.inf).squeeze(-1).transpose(1, 2)


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
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("query_block", "block"), SIZES)
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
@pytest.mark.parametrize(("query_block", "block"), SIZES)
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


BAD = [
    ({"block": 8}, "block is 8; it must be 1 or an integer of 16 to 128"),
    ({"query_block": 129}, "query_block is 129"),
    ({"query_block": True}, "query_block is True"),
    ({"window": -1}, "window is -1"),
    ({"sink_tokens": 1.5}, "sink_tokens is 1.5"),
    ({"causal": None}, "causal is None"),
    ({"blocks": torch.zeros(2, 3, 5, 3, dtype=torch.int64)}, "blocks has shape [2, 3, 5, 3]"),
    ({"blocks": torch.zeros(2, 2, 4, 3, dtype=torch.int64)}, "blocks has shape [2, 2, 4, 3]"),
    ({"blocks": torch.zeros(2, 2, 5, 0, dtype=torch.int64)}, "blocks has shape [2, 2, 5, 0]"),
    ({"blocks": torch.zeros(2, 2, 5, 3)}, "blocks has dtype torch.float32"),
    ({"counts": torch.zeros(2, 2, 4, dtype=torch.int64)}, "counts has shape"),
    ({"columns": torch.zeros(2, 4, 3, dtype=torch.int64)}, "columns has shape"),
    ({"bias": torch.zeros(2, 2, 5, 3)}, "bias has dtype torch.float32"),
    ({"bias": torch.zeros(2, 2, 5, 2).double()}, "bias has shape"),
    ({"q_positions": torch.arange(4)}, "q_positions has shape"),
    ({"q_positions": torch.arange(5).flip(0)}, "q_positions is [4, 3, 2, 1, 0]; it must count up by one"),
    ({"starts": torch.zeros(3, dtype=torch.int64)}, "starts has shape"),
    ({"starts": torch.zeros(2)}, "starts has dtype"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_argument_is_named(change, message):
    tensors, given = lists(inputs(5), 1, 16)
    with pytest.raises(ValueError) as caught:
        block_sparse_attention(**tensors | given | change)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["q_positions", "starts"])
def test_packed_sequences_have_no_padding(name):
    cu_seqlens, tensors = torch.tensor([0, 5], dtype=torch.int32), inputs(5, b=1)
    tensors, given = lists(tensors, 1, 16, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=f"{name} is given beside cu_seqlens"):
        block_sparse_attention(**tensors, **given, cu_seqlens=cu_seqlens, **{name: torch.arange(5)})


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


def test_the_op_is_well_formed():
    tensors, given = lists(inputs(20, dtype=torch.float32), 16, 16, columns=3, bias=True)
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    args = [tensors["q"], tensors["k"], tensors["v"], given["blocks"], given["counts"], given["columns"]]
    args += [tensors["bias"], None, None, None, 16, 16, True, 2, 1, 0.4]
    torch.library.opcheck(torch.ops.zoo.block_sparse_attention_chunked.default, tuple(args))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_in_one_graph(packed, evaluate, assert_close):
    cu_seqlens = torch.tensor([0, 3, 3, 20], dtype=torch.int32) if packed else None
    tensors, given = lists(inputs(20, b=1, dtype=torch.float32), 16, 16, columns=2, bias=True, cu_seqlens=cu_seqlens)
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    options = {"return_lse": True, "window": 2, "cu_seqlens": cu_seqlens, **given}
    assert_close(evaluate(compiled, tensors, **options), evaluate(block_sparse_attention, tensors, **options), 1e-5)
