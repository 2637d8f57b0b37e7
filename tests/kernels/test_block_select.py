"""The choice of blocks: against naive scores and a naive choice written here, budgets, forced blocks, causality."""

from __future__ import annotations

import pytest
import torch
from select_calls import SCALE, STRIDE, choose, inputs

from zoo.kernels.block_sparse_attention import block_sparse_attention, query_blocks, select
from zoo.kernels.block_sparse_attention.budget import BudgetSchedule
from zoo.kernels.block_sparse_attention.scores import SCORES, extend_pooled, pool_keys
from zoo.kernels.block_sparse_attention.select import choose_blocks, refine, select_blocks

BUDGETS = [
    BudgetSchedule(fixed=3),
    BudgetSchedule(fraction=0.5),
    BudgetSchedule(alpha=1.5, exponent=0.5),
    BudgetSchedule(mass=0.7),
    BudgetSchedule(mass=0.9, least=2, most=4),
]


def assert_lists(found, expected):
    """Rows [(b, row, lists by head)] beside blocks and counts."""
    blocks, counts = found
    assert blocks.dtype == counts.dtype == torch.int32
    for n, row, lists in expected:
        for head, want in enumerate(lists):
            own = blocks[n, head, row].tolist()
            assert int(counts[n, head, row]) == len(want), (n, row, head, own, want)
            assert sorted(own[: len(want)]) == sorted(want), (n, row, head, own, want)
            assert all(x == -1 for x in own[len(want) :])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize(("local", "sink"), [(1, 0), (2, 1), (0, 0)])
def test_equals_naive_choice(score, heads, causal, budget, local, sink):
    tensors, (query_block, block) = inputs(44, 75), (16, 8)
    if score == "antidiagonal":
        tensors = inputs(44, 76)  # whole tiles: the definition of a cut one is that of zeros
    tk, options = tensors["k"].shape[1], {"score": score, "heads": heads, "causal": causal}
    options |= {"local": local, "sink": sink}
    found = select_blocks(
        **tensors, budget=budget, query_block=query_block, block=block, stride=STRIDE, scale=SCALE, **options
    )
    expected = []
    for n in range(2):
        for row in range(3):
            i = list(range(16 * row, min(16 * row + 16, 44)))
            at = [tk - 44 + x for x in i]
            lists = choose(tensors["q"][n, i], tensors["k"][n], at, budget, block=block, **options)
            expected.append((n, row, lists))
    assert_lists(found, expected)


@pytest.mark.parametrize("score", ["mean", "bounds"])
@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_lists_of_single_queries_equal_naive_choice(score, heads, budget):
    tensors, options = inputs(11, 30), {"score": score, "heads": heads, "causal": True, "local": 1, "sink": 1}
    found = select_blocks(**tensors, budget=budget, query_block=1, block=4, scale=SCALE, **options)
    expected = []
    for n in range(2):
        for i in range(11):
            q = tensors["q"][n, i : i + 1]
            expected.append((n, i, choose(q, tensors["k"][n], [19 + i], budget, block=4, **options)))
    assert_lists(found, expected)


def test_block_mixture(evaluate, assert_close):
    """MoBA (Lu et al. 2025, arXiv 2502.13189), token by token: the own block up to the token, and of the blocks before
    it those whose mean keys the query likes best."""
    tensors, size, top = inputs(70, b=1) | {"v": torch.randn(1, 70, 2, 5).double()}, 16, 3
    likes = torch.einsum("bihk,bchk->bhic", tensors["q"], pool_keys(tensors["k"], size=size).repeat_interleave(2, 2))

    def naive(q, k, v):
        rows = []
        for i in range(70):
            for h in range(4):
                past = likes[0, h, i, : i // size].topk(min(top - 1, i // size)).indices.tolist()
                seen = [j for c in past for j in range(c * size, (c + 1) * size)] + list(range(i // size * size, i + 1))
                weights = (k[0, seen, h // 2] @ q[0, i, h] / 6**0.5).softmax(0)
                rows.append(weights @ v[0, seen, h // 2])
        return torch.stack(rows).view(1, 70, 4, 5)

    lists = select_blocks(tensors["q"], tensors["k"], top, query_block=1, block=size, heads="query")
    given = dict(zip(("blocks", "counts"), lists, strict=True)) | {"query_block": 1, "block": size}
    assert_close(evaluate(block_sparse_attention, tensors, **given), evaluate(naive, tensors), 1e-10)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("budget", BUDGETS[::3], ids=str)
def test_packed_and_padded_equal_separate(score, budget):
    """Each sequence of a packed batch, and each left-padded row, is chosen for as if it were alone."""
    ends, options = [0, 0, 20, 21, 60], {"query_block": 16, "block": 8, "score": score, "stride": STRIDE, "sink": 1}
    cu_seqlens, tensors = torch.tensor(ends, dtype=torch.int32), inputs(60, b=1)
    blocks, counts = select_blocks(**tensors, budget=budget, cu_seqlens=cu_seqlens, **options)
    row = 0
    for a, b in zip(ends, ends[1:], strict=False):
        if a == b:
            continue
        alone = {name: x[:, a:b] for name, x in tensors.items()}
        padded = {name: torch.cat([x.new_full((1, 7, *x.shape[2:]), 99.0), x], 1) for name, x in alone.items()}
        want, number = select_blocks(**alone, budget=budget, **options)
        rows = slice(row, row := row + number.shape[2])
        width = min(want.shape[3], blocks.shape[3])
        assert torch.equal(counts[:, :, rows], number) and torch.equal(blocks[:, :, rows, :width], want[..., :width])
        assert (blocks[:, :, rows, width:] == -1).all() and (want[..., width:] == -1).all()
        other, other_number = select_blocks(**padded, budget=budget, starts=torch.tensor([7]), **options)
        assert torch.equal(other_number[:, :, : number.shape[2]], number)
        width = min(want.shape[3], other.shape[3])
        assert torch.equal(other[:, :, : number.shape[2], :width], want[..., :width])


@pytest.mark.parametrize("score", ["mean", "bounds"])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_one_list_per_query_looks_at_no_later_key(score, budget):
    tensors, options = inputs(50), {"query_block": 1, "block": 8, "score": score, "budget": budget}
    before = select_blocks(**tensors, **options)
    tensors["k"][:, 30:] = 9.0
    after = select_blocks(**tensors, **options)
    assert torch.equal(before[1][:, :, :30], after[1][:, :, :30])
    width = min(before[0].shape[3], after[0].shape[3])
    assert torch.equal(before[0][:, :, :30, :width], after[0][:, :, :30, :width])


@pytest.mark.parametrize("score", SCORES)
def test_decoding_with_pooled_keys_equals_the_whole(score):
    block = 1 if score == "antidiagonal" else 8
    tensors, stride = inputs(40), 1 if score == "antidiagonal" else 8
    options = {"query_block": 1, "block": block, "score": score, "stride": stride, "budget": 3}
    whole = select_blocks(**tensors, **options)
    pooled = pool_keys(tensors["k"], size=block, score=score)
    for i in (0, 17, 39):
        one = select_blocks(
            tensors["q"][:, i : i + 1], tensors["k"] * 0, pooled=pooled, q_positions=torch.tensor([i]), **options
        )
        assert torch.equal(one[0], whole[0][:, :, i : i + 1]) and torch.equal(one[1], whole[1][:, :, i : i + 1])


def test_bounds_are_above_every_score():
    tensors = inputs(40, b=1)
    pooled = pool_keys(tensors["k"], size=8, score="bounds")
    high, low = pooled.split(6, -1)
    q = tensors["q"].unflatten(2, (2, 2))
    bound = torch.maximum(q[:, :, None] * high[:, None, :, :, None], q[:, :, None] * low[:, None, :, :, None]).sum(-1)
    scores = torch.einsum("bixgk,bjxk->bijxg", q, tensors["k"]).unflatten(2, (-1, 8)).amax(3)
    assert (bound >= scores - 1e-9).all()


def test_slices_do_not_matter(monkeypatch):
    tensors, options = inputs(100), {"query_block": 16, "block": 16, "budget": BudgetSchedule(mass=0.8)}
    for score in SCORES:
        whole = select_blocks(**tensors, score=score, **options)
        with monkeypatch.context() as small:
            small.setattr(select, "LIMIT", 1)
            parts = select_blocks(**tensors, score=score, **options)
        assert all(torch.equal(x, y) for x, y in zip(whole, parts, strict=True))


def test_estimates_never_fill_all_scores(monkeypatch):
    sizes = []
    original = select.estimate
    monkeypatch.setattr(select, "LIMIT", 1 << 14)
    monkeypatch.setattr(select, "estimate", lambda *args: sizes.append(original(*args).numel()) or original(*args))
    tensors = inputs(2048, b=1)
    for score in SCORES:
        sizes.clear()
        select_blocks(**tensors, budget=4, query_block=16, block=64, score=score)
        assert len(sizes) > 1 and max(sizes) <= 1 << 14


@pytest.mark.parametrize("score", SCORES)
def test_all_mass_is_dense_attention(score):
    tensors, v = inputs(50), torch.randn(2, 50, 2, 5).double()
    blocks, counts = select_blocks(
        **tensors, budget=BudgetSchedule(fraction=1.0), query_block=16, block=16, score=score, heads="query"
    )
    o = block_sparse_attention(**tensors, v=v, blocks=blocks, counts=counts, query_block=16, block=16)
    every = torch.arange(4).expand(2, 4, query_blocks(50, 16), -1)
    torch.testing.assert_close(o, block_sparse_attention(**tensors, v=v, blocks=every, query_block=16, block=16))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_given_weights_choose_as_estimates_do(budget):
    """Antidiagonal weights, brought by the caller."""
    ends = torch.tensor([0, 20, 20, 60], dtype=torch.int32)
    for more in ({}, {"causal": False}, {"starts": torch.tensor([8])}, {"cu_seqlens": ends}):
        tensors, seen = inputs(60, b=1), []
        options = {"query_block": 16, "block": 8, "local": 2, "sink": 1, "budget": budget, **more}
        with pytest.MonkeyPatch.context() as spy:
            original = select._choose
            spy.setattr(select, "_choose", lambda *args, to=seen, run=original: to.append(args[0]) or run(*args))
            expected = select_blocks(**tensors, score="antidiagonal", stride=STRIDE, **options)
        found = choose_blocks(torch.cat(seen, 3).mean(2), **tensors, **options)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="weights has shape"):
        choose_blocks(torch.zeros(1, 2, 4, 7).double(), **tensors, budget=1, query_block=16, block=8)


def test_the_best_block_is_found():
    """One block holds the key that every query asks for."""
    for score in SCORES:
        q, k = torch.ones(1, 64, 2, 4), torch.zeros(1, 64, 2, 4)
        k[:, 16:32] = 3.0
        blocks, counts = select_blocks(q, k, 2, query_block=16, block=16, score=score)
        assert (counts[..., 3] == 2).all() and (blocks[..., 3, :].sort(-1).values == torch.tensor([1, 3])).all()


@pytest.mark.parametrize(("score", "budget"), list(zip(SCORES, BUDGETS[1:4], strict=True)), ids=str)
def test_compiles_in_one_graph(score, budget):
    torch.compiler.reset()

    def both(q, k, cu_seqlens):
        options = {"query_block": 16, "block": 16, "cu_seqlens": cu_seqlens}
        blocks, counts = select_blocks(q, k, budget, score=score, **options)
        return counts, block_sparse_attention(q, k, k, blocks, counts, **options)

    tensors = {name: x.float() for name, x in inputs(60, b=1).items()}
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=False)
    for cu_seqlens in (None, torch.tensor([0, 3, 3, 60], dtype=torch.int32)):
        expected = both(**tensors, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(compiled(**tensors, cu_seqlens=cu_seqlens), expected)


def test_refine():
    blocks, counts = refine(torch.tensor([[[[2, 0]]]]), torch.tensor([[[1]]]), 3)
    assert blocks.tolist() == [[[[6, 7, 8, 0, 1, 2]]]] and counts.tolist() == [[[3]]]
    negative, none = refine(torch.tensor([-1]), None, 2)
    assert (negative < 0).all() and none is None


def test_lists_ascend_and_name_no_later_block():
    """Sink blocks that begin after the queries are not listed either."""
    blocks, counts = select_blocks(**inputs(64), budget=2, query_block=16, block=16, sink=3)
    assert blocks[0, 0].tolist() == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 2, 3]]
    assert counts[0, 0].tolist() == [1, 2, 3, 4]
    blocks, _ = select_blocks(**inputs(80), budget=4, query_block=16, block=8)
    assert (blocks[:, :, 4].diff() > 0).all()


def test_packed_without_tokens():
    none = {name: x[:, :0] for name, x in inputs(1, b=1).items()}
    options = {"cu_seqlens": torch.tensor([0, 0, 0], dtype=torch.int32), "query_block": 16, "block": 16, "budget": 2}
    for found in (select_blocks(**none, **options), choose_blocks(torch.zeros(1, 2, 2, 0).double(), **none, **options)):
        assert found[0].tolist() == [[[[-1]] * 2] * 2] and found[1].tolist() == [[[0] * 2] * 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("score", SCORES)
def test_new_keys_extend_pooled_ones(score, dtype):
    k, size = torch.randn(2, 9, 2, 5, dtype=dtype), 4
    options = {"size": size, "score": score}
    own = {} if score == "mean" else {"dtype": dtype}
    pooled = torch.full_like(pool_keys(k, **options, **own), torch.nan)
    for i in range(9):
        extend_pooled(pooled, k[:, i : i + 1], torch.tensor([i, i - 2]), **options)
    extend_pooled(pooled, k[:, :1], torch.tensor([-1, 12]), **options)
    for row, length in ((0, 9), (1, 7)):
        want = pool_keys(k[row : row + 1, 9 - length :], **options, **own)
        error = {"rtol": 1e-6, "atol": 1e-6} if score == "mean" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(pooled[row, : want.shape[1]], want[0], **error)
        assert pooled[row, want.shape[1] :].isnan().all()


def test_bounds_of_bf16_keys_are_exact_in_bf16():
    k = torch.randn(1, 40, 2, 6).bfloat16()
    pooled = pool_keys(k, size=8, score="bounds", dtype=torch.bfloat16)
    assert pooled.dtype == torch.bfloat16 and torch.equal(pooled.float(), pool_keys(k, size=8, score="bounds"))
    options = {"query_block": 1, "block": 8, "score": "bounds", "budget": 3}
    q = torch.randn(1, 40, 4, 6).bfloat16()
    found = select_blocks(q, k, pooled=pooled, **options)
    assert all(torch.equal(x, y) for x, y in zip(found, select_blocks(q, k, **options), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooled": torch.zeros(2, 3, 2, 7)}, "pooled has shape"),
        ({"pooled": torch.zeros(2, 3, 2, 6).bfloat16()}, "pooled has dtype torch.bfloat16; means must"),
        ({"pooled": torch.zeros(2, 3, 2, 6).half()}, "pooled has dtype torch.float16"),
        ({"pooled": torch.zeros(2, 3, 6, 2).transpose(2, 3)}, "pooled is not contiguous"),
        ({"k": torch.zeros(2, 2, 2, 6).bfloat16()}, "k has shape"),
        ({"positions": torch.zeros(1, dtype=torch.int64)}, "positions has shape"),
        ({"score": "max"}, "score is 'max'"),
        ({"size": 0}, "size is 0"),
    ],
    ids=str,
)
def test_bad_extensions_are_named(change, message):
    pooled, k = torch.zeros(2, 3, 2, 6), torch.zeros(2, 1, 2, 6).bfloat16()
    arguments = {"pooled": pooled, "k": k, "positions": torch.zeros(2, dtype=torch.int64), "size": 4} | change
    with pytest.raises(ValueError, match=message):
        extend_pooled(**arguments)
    with pytest.raises(ValueError, match="dtype is torch.float16"):
        pool_keys(k, size=4, dtype=torch.float16)
