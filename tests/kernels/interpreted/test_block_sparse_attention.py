"""The Triton kernels of block-sparse attention that go by query blocks, against the reference."""

from __future__ import annotations

import pytest
import torch
from sparse_calls import lists

from zoo.kernels import launch
from zoo.kernels.block_sparse_attention import block_sparse_attention, routed, triton_decode
from zoo.kernels.block_sparse_attention import triton as backend
from zoo.kernels.block_sparse_attention.call import Call
from zoo.kernels.block_sparse_attention.plans import Inverse, Plan

CLOSE = {"window": 5, "sink_tokens": 3}
NONE = dict.fromkeys(["counts", "columns", "bias", "q_positions", "starts", "cu_seqlens"])
NONE |= {"causal": True, "window": 0, "sink_tokens": 0, "scale": 1.0}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """So that few tokens fill many tiles, some of them seen whole; and no kernels but those of this file."""
    tiles = {"BM": 32, "BN": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(launch, "choice", lambda *_: tiles)
    monkeypatch.setattr(backend, "SPECIAL", ())


def inputs(tq, tk=None, h=2, hk=1, k=16, v=16, *, b=1):
    tk = tk or tq
    return {"q": torch.randn(b, tq, h, k), "k": torch.randn(b, tk, hk, k), "v": torch.randn(b, tk, hk, v)}


@pytest.fixture
def check(evaluate, assert_close):
    """Values and all gradients, those of lse and bias with them."""

    def run(made, rms=1e-5, **options):
        tensors, given = made
        given = given | {"return_lse": True} | options
        exact = {name: x.double() for name, x in tensors.items()}
        expected = evaluate(block_sparse_attention, exact, backend="reference", **given)
        assert_close(evaluate(block_sparse_attention, tensors, backend="triton", **given), expected, rms)

    return run


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_several_tiles(check, causal):
    tensors, given = lists(inputs(50), 32, 32, heads=1)
    blocks = torch.tensor([[1, 9, 0], [1, 0, 0]])[None, None]
    check((tensors, given | {"blocks": blocks, "counts": None}), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_every_way_to_show_a_key(check, causal):
    check(lists(inputs(40), 16, 16, heads=1, columns=5, bias=True), causal=causal, **CLOSE)


def test_columns_beside_lists(check):
    check(lists(inputs(36, 41), 16, 16, heads=1, columns=18, entries=2))


@pytest.mark.parametrize("mask", [{"window": 9}, {"sink_tokens": 20}, {"window": 3, "causal": False}], ids=str)
def test_windows_and_sinks_beside_lists(check, mask):
    check(lists(inputs(33), 16, 16, heads=1, entries=2), **mask)


def test_tiles_gather_blocks_of_odd_sizes(check):
    """A block ends inside a tile; a query block has several tiles of three heads."""
    check(lists(inputs(24, 30, 3), 20, 21, heads=1, bias=True), window=2)


def test_lists_of_query_heads(check):
    check(lists(inputs(21), 17, 16, heads=2, columns=3, bias=True), sink_tokens=2)


def test_a_list_for_every_query(check):
    check(lists(inputs(4, 40, 5), 1, 16, heads=1, columns=2), window=3)


def test_lists_of_tokens(check):
    check(lists(inputs(5, 9, 3), 1, 1, heads=1, bias=True), window=2)


def test_token_lists_of_query_blocks(check):
    check(lists(inputs(14), 16, 1, heads=1, entries=20))


@pytest.mark.parametrize(("tq", "tk"), [(20, 45), (45, 20)])
def test_more_or_fewer_queries_than_keys(check, tq, tk):
    check(lists(inputs(tq, tk), 16, 16, heads=1), window=3)


@pytest.mark.parametrize(("first", "mask"), [(14, {}), (15, {}), (17, {"window": 3}), (18, {"window": 3})], ids=str)
def test_blocks_that_are_just_seen_whole_or_not(check, first, mask):
    blocks = torch.arange(2).expand(1, 1, 1, 2)
    check((inputs(4, first + 4), {"query_block": 16, "block": 16, "blocks": blocks}), **mask)


@pytest.mark.parametrize("places", [None, [3, -2]], ids=str)
def test_padded_rows_and_positions(check, places):
    made = lists(inputs(17, 25, b=2), 16, 16, heads=1, columns=2, bias=True)
    at = {} if places is None else {"q_positions": torch.tensor(places)[:, None] + torch.arange(17)}
    check(made, sink_tokens=1, starts=torch.tensor([0, 7]), **at)


def test_packed_sequences(check):
    cu_seqlens = torch.tensor([0, 0, 1, 22, 22, 30], dtype=torch.int32)
    made = lists(inputs(30), 16, 16, heads=1, columns=2, bias=True, cu_seqlens=cu_seqlens)
    check(made, window=3, sink_tokens=1, cu_seqlens=cu_seqlens)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 2, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize(("query_block", "block"), [(1, 16), (1, 1), (16, 1), (17, 40), (64, 16), (128, 128)])
def test_sizes_and_heads(check, query_block, block, heads, packed):
    cu_seqlens = torch.tensor([0, 5, 5, 24], dtype=torch.int32) if packed else None
    h, hk, hs = heads
    made = lists(inputs(24, h=h, hk=hk), query_block, block, heads=hs, columns=3, bias=True, cu_seqlens=cu_seqlens)
    check(made, cu_seqlens=cu_seqlens, **CLOSE)


@pytest.mark.slow
def test_large_blocks(check):
    check(lists(inputs(20, 300), 16, 256, heads=1, entries=2, bias=True))


@pytest.mark.parametrize(("k", "v"), [(3, 40), (33, 5)])
def test_widths(check, k, v):
    check(lists(inputs(20, k=k, v=v), 16, 16, heads=1))


def test_repeated_entries_count_once_with_the_first_bias(check):
    tensors, given = lists(inputs(33), 16, 16, heads=1, entries=6, bias=True)
    check((tensors, given | {"blocks": given["blocks"].clamp(max=1).int(), "counts": given["counts"].int()}))


def test_long_lists_are_tidied_in_parts(monkeypatch, check):
    monkeypatch.setattr("zoo.kernels.block_sparse_attention.plans.ENTRIES", 16)
    check(lists(inputs(10), 16, 1, heads=1, entries=20), sink_tokens=2)


def test_large_scores(check):
    tensors, given = lists(inputs(40), 16, 16, heads=1)
    check((tensors | {"q": 100 * tensors["q"]}, given), rms=1e-4)


def test_gradient_of_the_lse_alone_and_strided_inputs(evaluate, assert_close):
    tensors, given = lists(inputs(36), 16, 16, heads=1)

    def norms(q, k, v, backend):
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return block_sparse_attention(q, k, v, **given, return_lse=True, backend=backend)[1]

    found = evaluate(norms, tensors, backend="triton")
    assert not found["v"].any()
    assert_close(found, evaluate(norms, tensors, backend="reference"), 1e-5)


def test_blind_rows_are_zero_with_zero_gradient():
    """Whatever the gradient of their lse."""
    tensors = {name: x.requires_grad_() for name, x in inputs(33).items()}
    blocks = torch.tensor([[0], [-1], [7]])[None, None]
    o, lse = block_sparse_attention(
        **tensors, blocks=blocks, query_block=16, block=16, return_lse=True, backend="triton"
    )
    assert not o[:, 16:].any() and (lse[:, 16:] == -torch.inf).all() and lse[:, :16].isfinite().all()
    weights = torch.ones_like(lse).masked_fill(lse == -torch.inf, torch.nan)
    dq, dk, dv = torch.autograd.grad([o, lse], list(tensors.values()), [torch.ones_like(o), weights])
    assert not dq[:, 16:].any() and not dk[:, 16:].any() and not dv[:, 16:].any()
    assert all(x.isfinite().all() and x.any() for x in (dq, dk, dv))


def test_columns_in_parts(monkeypatch, check):
    monkeypatch.setattr(backend, "TOKENS", 10)
    check(lists(inputs(36), 16, 16, heads=1, columns=20))


def test_result_does_not_depend_on_the_batch():
    tensors, given = lists(inputs(40, b=2), 16, 16, heads=1)
    whole = block_sparse_attention(**tensors, **given, backend="triton")
    own = {name: x[1:] if isinstance(x, torch.Tensor) else x for name, x in (tensors | given).items()}
    assert torch.equal(whole[1:], block_sparse_attention(**own, backend="triton"))


@pytest.mark.parametrize(("dtype", "rms"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_inputs(evaluate, assert_close, dtype, rms):
    tensors, given = lists(inputs(36), 16, 16, heads=1)
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    expected = evaluate(block_sparse_attention, {name: x.double() for name, x in tensors.items()}, **given)
    found = evaluate(block_sparse_attention, tensors, backend="triton", **given)
    assert found["output 0"].dtype == dtype
    assert_close(found, expected, rms)


def test_inverse_lists():
    """Of every key block the query blocks that list it, in ascending order."""
    blocks = torch.tensor([[[[0, -1], [1, 0], [0, 0], [3, 2]]]])
    call = Call(**inputs(60), blocks=blocks, query_block=16, block=16, **NONE)
    plan = Plan.of(call)
    inverse = Inverse.of(call, plan)
    assert plan.meta[0, 0].tolist() == [[1, 0, 0], [2, 0, 1], [1, 0, 1], [2, 0, 1]]
    assert inverse.bounds.tolist() == [0, 3, 4, 5, 6] and inverse.owners[:6].tolist() == [0, 1, 2, 1, 3, 3]


def test_empty_packed_batch():
    tensors, cu_seqlens = {name: x[:, :0] for name, x in inputs(1).items()}, torch.zeros(3, dtype=torch.int32)
    blocks = torch.zeros(1, 1, 2, 1, dtype=torch.int64)
    options = {"query_block": 16, "block": 16, "cu_seqlens": cu_seqlens, "backend": "triton"}
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    o = block_sparse_attention(**tensors, blocks=blocks, **options)
    assert o.shape == (1, 0, 2, 16)
    o.sum().backward()


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"k": 257}, "up to 256"), ({"scale": -1.0}, "must be positive"), ({"dtype": torch.float64}, "fp64")],
    ids=str,
)
def test_unsupported_calls_are_refused_and_run_elsewhere(change, reason):
    tensors = inputs(17, k=change.pop("k", 16))
    tensors = {name: x.to(change.get("dtype", x.dtype)) for name, x in tensors.items()}
    change.pop("dtype", None)
    tensors, given = lists(tensors, 16, 16, heads=1)
    with pytest.raises(ValueError, match=reason):
        block_sparse_attention(**tensors, **given, **change, backend="triton")
    block_sparse_attention(**tensors, **given, **change)


def test_decoding_and_routing_go_elsewhere(monkeypatch):
    calls = []
    for module in (triton_decode, routed):
        monkeypatch.setattr(module, "run", lambda call, name=module.__name__: calls.append(name) or (call.q, call.q))
    monkeypatch.setattr(backend, "SPECIAL", (triton_decode, routed))
    for tensors, sizes in ((inputs(1, 40), (1, 16)), (inputs(17), (1, 16))):
        made, given = lists(tensors, *sizes, heads=2)
        block_sparse_attention(**made, **given, backend="triton")
    assert [name.rsplit(".")[-1] for name in calls] == ["triton_decode", "routed"]


def test_compiles_as_one_graph(evaluate, assert_close):
    tensors, given = lists(inputs(20), 16, 16, heads=1, columns=2, bias=True)
    options = {"backend": "triton", "return_lse": True, "window": 2, **given}
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    found = evaluate(compiled, tensors, **options)
    assert_close(found, evaluate(block_sparse_attention, tensors, **options), 1e-7)


@pytest.mark.slow
def test_operator_contract():
    tensors, given = lists(inputs(5), 16, 16, heads=1, columns=2, bias=True)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    args = tuple(vars(Call(**NONE | leaves | given | {"window": 2})).values())
    torch.library.opcheck(torch.ops.zoo.block_sparse_attention.default, args)
