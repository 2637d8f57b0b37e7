"""The choice of blocks by Triton kernels against torch in fp64: the same lists, for any place of queries and keys."""

from __future__ import annotations

import pytest
import torch
from select_calls import STRIDE

from zoo.kernels import dispatch, launch
from zoo.kernels.block_sparse_attention import select, triton_launch, triton_select
from zoo.kernels.block_sparse_attention.budget import BudgetSchedule
from zoo.kernels.block_sparse_attention.scores import SCORES, extend_pooled, pool_keys
from zoo.kernels.block_sparse_attention.select import choose_blocks, select_blocks

TILES = {
    "estimates": {"BM": 16, "BN": 4, "BK": 16},
    "few": {"BM": 16, "BN": 4, "BK": 16},
    "antidiagonal": {"BM": 16, "BN": 8, "BK": 16, "GROUP": 2},
    "choose": {"num_warps": 1},
    "pool": {"BT": 4, "BC": 16},
}
SLOW = pytest.mark.slow
OPTIONS = {"query_block": 16, "block": 8, "stride": STRIDE, "budget": 3}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(launch, "choice", lambda name, *_: dict(TILES[name.split(".")[1]]))


@pytest.fixture
def launched(monkeypatch):
    """The kernels that ran."""
    names, start = [], triton_launch.start

    def spy(name, *args, **options):
        names.append(name)
        start(name, *args, **options)

    for module in (triton_launch, triton_select):
        monkeypatch.setattr(module, "start", spy)
    return names


@pytest.fixture
def check(launched):
    def run(tensors, **options):
        options = OPTIONS | options
        found = select_blocks(**tensors, **options)
        assert launched[-1] == "choose"
        exact = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        with dispatch.use("chunked"):
            expected = select_blocks(**exact, **options)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y), (x, y)

    return run


def inputs(tq, tk=None, h=2, hk=1, k=6, b=1):
    return {"q": torch.randn(b, tq, h, k) * 2, "k": torch.randn(b, tk or tq, hk, k)}


@pytest.mark.parametrize(("score", "causal"), [("mean", True), ("bounds", False), ("antidiagonal", True)])
def test_numbers(monkeypatch, score, causal):
    """What the choice goes by, where it reads it, and not the choice alone."""
    tensors, options, seen = inputs(28, 60), OPTIONS | {"score": score, "causal": causal, "heads": "query"}, []
    for module in (triton_select, select):
        choose = module._choose
        monkeypatch.setattr(module, "_choose", lambda *args, run=choose: seen.append(args[0].clone()) or run(*args))
    select_blocks(**tensors, **options)
    select_blocks(**{name: x.double() for name, x in tensors.items()}, **options)
    want = seen[1].flatten(1, 2)  # [1, 2, 2, 8]
    found = seen[0][: want.numel()].view_as(want).double()
    last = torch.tensor([48, 60]) if score == "antidiagonal" else torch.tensor([32, 48])  # keys of scored blocks
    read = (torch.arange(8) * 8 < last[:, None]) if causal else torch.ones(2, 8, dtype=torch.bool)
    read = read.expand_as(want)
    torch.testing.assert_close(found[read], want[read], rtol=1e-4, atol=1e-5)


SLOW_SCORES = [pytest.param("mean", marks=SLOW), pytest.param("bounds", marks=SLOW), "antidiagonal"]
KINDS = [
    *(("mean", "kv", True), ("bounds", "query", True), ("antidiagonal", "kv", False)),
    *(pytest.param(x, "query" if c else "kv", c, marks=SLOW) for x in SCORES for c in (True, False)),
]


@pytest.mark.parametrize(("score", "heads", "causal"), KINDS)
def test_scores(check, score, heads, causal):
    check(inputs(28, 60), score=score, heads=heads, causal=causal, local=1 + (not causal), sink=1)


@pytest.mark.parametrize("score", SLOW_SCORES)
def test_by_mass(check, score):
    check(inputs(28, 60), score=score, budget=BudgetSchedule(mass=0.7))


@pytest.mark.parametrize("score", SLOW_SCORES)
def test_padding_and_positions(check, score):
    """Rows padded by 0 and 21 tokens, beside keys that no query sees yet."""
    starts, at = torch.tensor([0, 21]), torch.arange(20, 44) - torch.tensor([[0], [21]])
    check(inputs(44, b=2), score=score, starts=starts)
    check(inputs(24, 50, b=2), score=score, starts=starts, q_positions=at)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=SLOW)])
def test_packed_sequences(check, score, causal):
    ends = torch.tensor([0, 0, 19, 20, 47], dtype=torch.int32)
    check(inputs(47), score=score, cu_seqlens=ends, causal=causal)


@pytest.mark.parametrize("score", SLOW_SCORES)
def test_heads_widths_and_odd_blocks(check, score):
    """Blocks that are no powers of two, of three tiles each; heads wider than a tile."""
    check(inputs(50, None, 4, 2, 20), score=score, query_block=20, block=12, heads="query" if score == "mean" else "kv")


@pytest.mark.parametrize("score", ["mean", "bounds"])
def test_one_list_per_query(check, score):
    check(inputs(6, 70, 4, 2), score=score, query_block=1, sink=2)


@pytest.mark.parametrize("score", SCORES)
def test_slices(check, launched, monkeypatch, score):
    monkeypatch.setattr(triton_launch, "LIMIT", 1)
    check(inputs(44), score=score)
    assert launched.count("choose") == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["mean", "bounds"])
def test_decoding_with_pooled_keys(check, score, dtype):
    """Of a cache with room for keys to come, about which nothing is known."""
    tensors = {name: x.to(dtype) for name, x in inputs(1, 64, 4, 2, b=2).items()}
    pooled = pool_keys(tensors["k"], size=8, score=score, dtype=dtype if score == "bounds" else None)
    pooled[:, 6:] = torch.nan
    at = {"q_positions": torch.tensor([[47], [30]]), "query_block": 1, "score": score}
    want = select_blocks(**{n: x.double() for n, x in tensors.items()}, **OPTIONS | at)
    found = select_blocks(tensors["q"], tensors["k"] * torch.nan, pooled=pooled, **OPTIONS | at)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_pooled_tiles():
    tensors = inputs(28)
    options = OPTIONS | {"score": "antidiagonal"}
    pooled = pool_keys(tensors["k"], size=STRIDE, score="antidiagonal")
    found = select_blocks(tensors["q"], tensors["k"] * torch.nan, pooled=pooled, **options)
    assert all(torch.equal(x, y) for x, y in zip(found, select_blocks(**tensors, **options), strict=True))


def given(weights, launched, **options):
    b, _, rows, columns = weights.shape
    options = {"query_block": 16, "block": 16} | options
    tensors = torch.empty(b, 16 * rows, 4, 2), torch.empty(b, 16 * columns, 2, 2)
    found = choose_blocks(weights, *tensors, **options)
    assert launched[-1] == "choose"
    with dispatch.use("chunked"):
        expected = choose_blocks(weights, *tensors, **options)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True)), (found, expected)


BUDGETS = [
    BudgetSchedule(fixed=4, least=2, most=3),
    BudgetSchedule(fraction=0.3),
    BudgetSchedule(alpha=1.5, exponent=0.5, least=2),
    BudgetSchedule(mass=0.5),
    BudgetSchedule(mass=1.0),
    BudgetSchedule(mass=0.9, least=3, most=6),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("options", [{"local": 2}, pytest.param({"local": 0}, marks=SLOW)], ids=str)
def test_given_weights(launched, budget, options):
    given(torch.rand(1, 1, 2, 21), launched, budget=budget, sink=3, **options)


@SLOW
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_given_weights_both_ways(launched, budget):
    for local in (0, 3):
        given(torch.rand(1, 1, 4, 21), launched, budget=budget, causal=False, local=local)


@pytest.mark.parametrize("budget", BUDGETS[::3], ids=str)
def test_equal_weights_are_chosen_from_the_first_on(launched, budget):
    for weights in (torch.randint(0, 4, (1, 1, 2, 21)).float(), torch.zeros(1, 1, 1, 21)):
        given(weights, launched, budget=budget, local=0)
    given(-torch.zeros(1, 1, 1, 9), launched, budget=2)


def test_weights_of_every_size_and_sign(launched):
    weights = torch.randn(1, 1, 4, 21) * 10 ** torch.randint(-30, 30, (21,)).float()
    weights[..., ::7] = torch.tensor([torch.inf, -torch.inf, 0.0])
    for budget in (4, 15):
        given(weights, launched, budget=budget, sink=1)


@pytest.mark.parametrize("score", ["mean", "bounds"])
def test_pooling(launched, score):
    k = torch.randn(2, 17, 2, 5)
    for at in ({}, {"starts": torch.tensor([0, 7])}):
        found = pool_keys(k, size=6, score=score, **at)
        torch.testing.assert_close(found.double(), pool_keys(k.double(), size=6, score=score, **at))
    ends = {"cu_seqlens": torch.tensor([0, 7, 7, 17], dtype=torch.int32)}
    found = pool_keys(k[:1], size=6, score=score, **ends)
    torch.testing.assert_close(found.double(), pool_keys(k[:1].double(), size=6, score=score, **ends))
    assert launched == ["pool"] * 3


@pytest.mark.parametrize("score", SCORES)
def test_new_keys_extend_pooled_ones(launched, score):
    k, size = torch.randn(2, 9, 2, 5), 4
    pooled = torch.full_like(pool_keys(k, size=size, score=score), torch.nan)
    before = pooled.clone()
    for i in range(9):
        extend_pooled(pooled, k[:, i : i + 1], torch.tensor([i, i - 2]), size=size, score=score)
    extend_pooled(pooled, k[:, :1], torch.tensor([-1, 12]), size=size, score=score)
    assert launched[-1] == "extend" and before.isnan().all()
    for row, length in ((0, 9), (1, 7)):
        own = k[row : row + 1, 9 - length :]
        want = pool_keys(own, size=size, score=score)
        error = 1e-6 if score == "mean" else 0.0
        torch.testing.assert_close(pooled[row, : want.shape[1]], want[0], rtol=error, atol=error)
        assert pooled[row, want.shape[1] :].isnan().all()


def test_what_kernels_refuse_runs_in_torch(launched):
    for change in ({"score": "bounds", "query_block": 144}, {"score": "antidiagonal", "block": 260}):
        select_blocks(**inputs(20), **OPTIONS | change)
    select_blocks(**inputs(20, k=300), **OPTIONS)
    select_blocks(**{name: x.double() for name, x in inputs(20).items()}, **OPTIONS)
    with dispatch.use("reference"):
        select_blocks(**inputs(20), **OPTIONS)
    assert "choose" not in launched


@SLOW
@pytest.mark.parametrize("score", SCORES)
def test_compiles_in_one_graph(score):
    torch.compiler.reset()

    def both(q, k, new, at):
        pooled = pool_keys(k, size=8, score="bounds")
        extend_pooled(pooled, new, at, size=8, score="bounds")
        return pooled, *select_blocks(q, k, score=score, **OPTIONS | {"budget": BudgetSchedule(fraction=0.5)})

    args = (*inputs(28).values(), torch.randn(1, 1, 1, 6), torch.tensor([27]))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(*args), both(*args))


@SLOW
def test_operators():
    tensors, none = inputs(20), (None, None, None, None)
    options = (8, 3, True, 1, 0, 2, 1, 1 << 30, 0.0)
    ops = torch.ops.zoo
    torch.library.opcheck(
        ops.select_blocks.default,
        (*tensors.values(), None, *none, "mean", False, 16, 4, 2, 0.5, *options),
        test_utils=("test_schema", "test_faketensor"),
    )
    weights = torch.rand(1, 1, 2, 3)
    torch.library.opcheck(
        ops.choose_blocks.default, (weights, tensors["q"], *none, 20, 16, 2, *options),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    pooled = ops.pool_keys(tensors["k"], None, None, "mean", 8, torch.float32)
    torch.library.opcheck(
        ops.extend_pooled.default, (pooled, tensors["k"][:, :1].clone(), torch.tensor([20]), "mean", 8),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
