"""Routing of single queries and heads to key blocks, in Triton, against the reference, gradients too."""

from __future__ import annotations

import pytest
import torch

from zoo.kernels import launch
from zoo.kernels.block_sparse_attention import block_sparse_attention, routed
from zoo.kernels.block_sparse_attention.call import Call

OPTIONAL = ("counts", "columns", "bias", "q_positions", "starts", "cu_seqlens")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """So that a few queries fill several tiles."""
    monkeypatch.setattr(launch, "choice", lambda *_: {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 1})


def inputs(tq=24, tk=None, h=2, hk=1, k=16, v=16, b=1):
    shapes = {"q": (b, tq, h, k), "k": (b, tk or tq, hk, k), "v": (b, tk or tq, hk, v)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def lists(tensors, block=16, entries=3, **extra):
    """Random lists with repeated, missing and absent blocks, and some later than the query."""
    (b, tq, h, _), tk = tensors["q"].shape, tensors["k"].shape[1]
    blocks = torch.randint(-1, -(-tk // block) + 1, (b, h, tq, entries))
    return {"query_block": 1, "block": block, "blocks": blocks} | extra


def call_of(q, k, v, blocks, *, causal=True, scale=0.25, query_block, block, window=0, sink_tokens=0, **optional):
    tensors = (q, k, v, blocks, *(optional.get(name) for name in OPTIONAL))
    return Call(*tensors, query_block, block, causal, window, sink_tokens, scale)


def run(q, k, v, **options):
    call = call_of(q, k, v, **options)
    assert routed.supports(call) is None
    return routed.run(call)


@pytest.fixture
def check(evaluate, assert_close):
    def compare(tensors, **options):
        reference = {"scale": 0.25, "return_lse": True, "backend": "reference"} | options
        expected = evaluate(block_sparse_attention, tensors, **reference)
        assert_close(evaluate(run, tensors, **options), expected, 1e-5)

    return compare


@pytest.mark.parametrize(("block", "causal"), [(16, True), (20, True), (64, True), (20, False)])
def test_blocks(check, block, causal):
    tensors = inputs(41, h=1)
    check(tensors, **lists(tensors, block), causal=causal)


def test_large_blocks(check, monkeypatch):
    monkeypatch.setattr(launch, "choice", lambda *_: {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 1})
    tensors = inputs(9, 300, h=1)
    check(tensors, **lists(tensors, 256, 2))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_repeated_entries_and_counts(check, kind):
    tensors = inputs(18)
    made = lists(tensors, entries=6)
    made["blocks"] = made["blocks"].to(kind)
    check(tensors, **made, counts=torch.randint(0, 7, (1, 2, 18)).to(kind))


@pytest.mark.parametrize("limit", [1, 1 << 30])
def test_heads_together_and_apart(check, monkeypatch, limit):
    monkeypatch.setattr(routed, "LIMIT", limit)
    tensors = inputs(9, h=4, hk=2, b=2)
    check(tensors, **lists(tensors, entries=2))


@pytest.mark.parametrize(("k", "v"), [(3, 20), (20, 3)])
def test_widths(check, k, v):
    tensors = inputs(17, h=1, k=k, v=v)
    check(tensors, **lists(tensors))


@pytest.mark.parametrize(("tq", "tk"), [(9, 40), (20, 17)])
def test_more_or_fewer_queries_than_keys(check, tq, tk):
    tensors = inputs(tq, tk)
    check(tensors, **lists(tensors))


def test_positions_and_padded_rows(check):
    tensors = inputs(12, 30, h=1, b=2)
    made = lists(tensors, starts=torch.tensor([0, 7]))
    check(tensors, **made)
    check(tensors, **made, q_positions=torch.stack([5 + torch.arange(12), torch.arange(12) - 4]))


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences(check, causal):
    ends = torch.tensor([0, 0, 1, 18, 18, 21], dtype=torch.int32)
    tensors = inputs(21)
    check(tensors, **lists(tensors, entries=2), cu_seqlens=ends, causal=causal)


def test_nothing_seen(evaluate):
    tensors = inputs(20, h=1)
    found = evaluate(run, tensors, **lists(tensors) | {"blocks": torch.full((1, 1, 20, 2), -1)})
    assert (found.pop("output 1") == -torch.inf).all()
    assert not any(x.any() for x in found.values())


def test_strided_inputs_and_the_gradient_of_the_lse_alone(evaluate, assert_close):
    def norms(q, k, v, function, **options):
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return function(q, k, v, **options)[1]

    tensors = inputs(12, h=2, hk=2)
    made = lists(tensors)
    reference = {"function": block_sparse_attention, "return_lse": True, "scale": 0.25, "backend": "reference"}
    expected = evaluate(norms, tensors, **reference, **made)
    assert_close(evaluate(norms, tensors, function=run, **made), expected, 1e-5)


@pytest.mark.parametrize(("dtype", "rms"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_inputs(evaluate, assert_close, dtype, rms):
    tensors = {name: x.to(dtype) for name, x in inputs(17).items()}
    made = lists(tensors)
    exact = {name: x.double() for name, x in tensors.items()}
    expected = evaluate(block_sparse_attention, exact, scale=0.25, return_lse=True, backend="reference", **made)
    found = evaluate(run, tensors, **made)
    assert found["output 0"].dtype == dtype
    assert_close(found, expected, rms)


def test_same_every_time(evaluate):
    tensors = inputs(12, b=2)
    made = lists(tensors)
    once, again = (evaluate(run, tensors, **made) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_compiles_as_one_graph(evaluate, assert_close):
    tensors = inputs(7)
    made = lists(tensors)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(evaluate(compiled, tensors, **made), evaluate(run, tensors, **made), 1e-7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query_block": 16}, "a list for each query"),
        ({"blocks": torch.zeros(1, 1, 24, 3, dtype=torch.int32)}, "and query head"),
        ({"window": 3}, "window"),
        ({"sink_tokens": 3}, "sink"),
        ({"columns": torch.zeros(1, 2, 3, dtype=torch.int32)}, "columns"),
        ({"bias": torch.zeros(1, 2, 24, 3)}, "bias"),
        ({"block": 1}, "at least 16"),
        ({"blocks": torch.zeros(1, 2, 24, 300, dtype=torch.int32)}, "up to 256 blocks"),
        ({"v": torch.zeros(1, 24, 1, 257)}, "up to 256"),
        ({"q": torch.zeros(1, 24, 2, 16).double()}, "fp64"),
        ({"scale": -1.0}, "positive"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_refused(change, reason):
    tensors = inputs()
    assert reason in routed.supports(call_of(**(tensors | lists(tensors) | change)))


@pytest.mark.slow
def test_operator_contract():
    tensors = inputs(20)
    leaves = [x.requires_grad_() for x in tensors.values()]
    args = (*leaves, lists(tensors)["blocks"], *[None] * 6, 1, 16, True, 0, 0, 0.4)
    torch.library.opcheck(torch.ops.zoo.block_sparse_attention_routed, args)
