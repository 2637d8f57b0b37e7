"""Decoding over listed blocks in Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from zoo.kernels import launch
from zoo.kernels.block_sparse_attention import block_sparse_attention, triton_decode
from zoo.kernels.block_sparse_attention.call import Call

TILES = {"BN": 16, "KEYS": 32, "num_warps": 4, "num_stages": 1}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """So that a few keys fill several tiles and parts."""
    monkeypatch.setattr(launch, "choice", lambda *_: TILES)


def inputs(tk=90, tq=1, h=2, hk=1, k=16, v=16, b=1):
    shapes = {"q": (b, tq, h, k), "k": (b, tk, hk, k), "v": (b, tk, hk, v)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def lists(tensors, block, entries, heads=1, **extra):
    """Random lists with repeated, missing and absent blocks."""
    (b, tq), tk = tensors["q"].shape[:2], tensors["k"].shape[1]
    blocks = torch.randint(-1, -(-tk // block) + 1, (b, heads, tq, entries))
    blocks[..., 0] = 0
    return {"query_block": 1, "block": block, "blocks": blocks} | extra


def run(arguments):
    """The op with the kernels of this file."""
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "blocks")]
    names = ("counts", "columns", "bias", "q_positions", "starts", "cu_seqlens")
    options = {"causal": True, "window": 0, "sink_tokens": 0, "scale": 0.25} | arguments
    call = Call(*tensors, *(options.pop(name, None) for name in names), **options)
    assert triton_decode.supports(call) is None
    return triton_decode.run(call)


@pytest.fixture
def check(assert_close):
    def compare(tensors, **options):
        expected = block_sparse_attention(**tensors, **options, scale=0.25, return_lse=True, backend="reference")
        names = ("o", "lse")
        found = dict(zip(names, run(tensors | options), strict=True))
        assert_close(found, dict(zip(names, expected, strict=True)), 1e-5)

    return compare


@pytest.mark.parametrize("block", [1, 16, 20, 64])
@pytest.mark.parametrize("mask", [{}, {"window": 7, "sink_tokens": 3}, {"causal": False}], ids=str)
def test_blocks_and_masks(check, block, mask):
    tensors = inputs()
    check(tensors, **lists(tensors, block, 12 if block == 1 else 3), **mask)


@pytest.mark.parametrize("block", [256, 384])
def test_large_blocks(check, monkeypatch, block):
    monkeypatch.setattr(launch, "choice", lambda *_: TILES | {"BN": 128, "KEYS": 256})
    tensors = inputs(2 * block - 30)
    check(tensors, **lists(tensors, block, 2))


@pytest.mark.parametrize("compared", [0, 1 << 15])
@pytest.mark.parametrize("block", [1, 16])
def test_repeated_entries_count_once_with_the_first_bias(check, monkeypatch, compared, block):
    """Compared in the kernel or cleaned before, int32 or int64, some beyond the counts."""
    monkeypatch.setattr(triton_decode, "COMPARED", compared)
    tensors = inputs(40, h=2, hk=2)
    blocks = torch.randint(0, 3, (1, 2, 1, 21))
    bias = torch.randn(1, 2, 1, 21)
    for kind in (torch.int32, torch.int64):
        counts = torch.tensor([[[21], [6]]]).to(kind)
        check(tensors | {"bias": bias}, blocks=blocks.to(kind), counts=counts, query_block=1, block=block)


@pytest.mark.parametrize("mask", [{}, {"window": 9, "sink_tokens": 2}, {"window": 3, "causal": False}], ids=str)
def test_columns_window_and_sinks_beside_a_bias(check, mask):
    tensors = inputs(50, h=2, hk=2)
    made = lists(tensors, 16, 3, 2, bias=torch.randn(1, 2, 1, 3), columns=torch.randint(-1, 52, (1, 2, 20)))
    check(tensors, **made, **mask)


@pytest.mark.parametrize("mask", [{}, {"window": 40}, {"window": 2, "causal": False}, {"sink_tokens": 99}], ids=str)
@pytest.mark.parametrize("places", [[[30], [-1]], [[3], [70]], [17], None], ids=str)
def test_positions_and_padded_rows(check, mask, places):
    tensors = inputs(45, h=1, b=2)
    places = {} if places is None else {"q_positions": torch.tensor(places)}
    made = lists(tensors, 16, 2, columns=torch.randint(-1, 47, (2, 1, 4)))
    check(tensors, **made, **mask, **places, starts=torch.tensor([0, 9], dtype=torch.int32))


@pytest.mark.parametrize("first", [20, -2])
def test_some_queries_each_with_a_list(check, first):
    """Lists count from the first query that is no padding."""
    tensors = inputs(33, tq=3)
    made = lists(tensors, 16, 2, counts=torch.tensor([[[2, 1, 0]]]))
    check(tensors, **made, q_positions=first + torch.arange(3))


def test_one_query_of_a_large_block(check):
    tensors = inputs(33)
    check(tensors, **lists(tensors, 16, 2) | {"query_block": 64})


@pytest.mark.parametrize(("h", "hk", "hs"), [(4, 2, 4), (20, 1, 1), (70, 1, 1), (2, 2, 2)])
def test_heads(check, h, hk, hs):
    tensors = inputs(20, h=h, hk=hk)
    check(tensors, **lists(tensors, 16, 1, hs))


@pytest.mark.parametrize(("k", "v"), [(3, 40), (40, 3)])
def test_widths(check, k, v):
    tensors = inputs(33, k=k, v=v)
    check(tensors, **lists(tensors, 16, 3))


def test_strided_caches_are_read_in_place(check):
    """A cache [B, Hk, Tk, K] of more room than keys, and one whose strides nothing divides."""
    tensors = inputs(48, hk=2, b=2)
    made = lists(tensors, 16, 2, 2)
    for pad in (8, 1):
        wide = {name: torch.zeros(2, 2, 60, 16 + pad) for name in ("k", "v")}
        for name, x in wide.items():
            x[:, :, 5:53, :16] = tensors[name].transpose(1, 2)
        check(tensors | {name: x[:, :, 5:53, :16].transpose(1, 2) for name, x in wide.items()}, **made)


def test_more_parts_than_are_merged_at_once(check):
    """The later ones weigh more."""
    entries = torch.arange(20).expand(1, 1, 1, -1)
    check(inputs(640, h=1), query_block=1, block=32, blocks=entries, bias=0.3 * entries)


def test_nothing_seen():
    o, lse = run(inputs(20) | {"query_block": 1, "block": 16, "blocks": torch.tensor([[[[-1, 9]]]])})
    assert not o.any() and (lse == -torch.inf).all()


def test_result_does_not_depend_on_the_batch():
    tensors = inputs(90, b=3)
    made = lists(tensors, 16, 4)
    whole = run(tensors | made)[0]
    one = {name: x[1:2] for name, x in (tensors | made).items() if torch.is_tensor(x)}
    assert torch.equal(whole[1:2], run(tensors | made | one)[0])


@pytest.mark.parametrize(("dtype", "rms"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_inputs(assert_close, dtype, rms):
    tensors = {name: x.to(dtype) for name, x in inputs(40).items()}
    made = lists(tensors, 16, 2)
    exact = {name: x.double() for name, x in tensors.items()}
    expected = block_sparse_attention(**exact, **made, scale=0.25)
    found = run(tensors | made)[0]
    assert found.dtype == dtype
    assert_close({"o": found}, {"o": expected}, rms)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.randn(1, 9, 2, 16)}, "it has 9 in blocks of 1"),
        ({"q": torch.randn(1, 2, 2, 16), "query_block": 16}, "it has 2 in blocks of 16"),
        ({"k": torch.randn(1, 90, 1, 16).requires_grad_()}, "no gradients"),
        ({"q": torch.randn(1, 1, 2, 16).double()}, "fp64"),
        ({"v": torch.randn(1, 90, 1, 257)}, "up to 256"),
        ({"cu_seqlens": torch.tensor([0, 1], dtype=torch.int32)}, "packed"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_refused(change, reason):
    tensors = inputs()
    optional = dict.fromkeys(("counts", "columns", "bias", "q_positions", "starts", "cu_seqlens"))
    options = {"causal": True, "window": 0, "sink_tokens": 0, "scale": 0.25}
    call = Call(**(tensors | lists(tensors, 16, 2) | optional | options | change))
    assert reason in triton_decode.supports(call)


@pytest.mark.slow
def test_operator_contract():
    tensors = inputs(20)
    made = lists(tensors, 16, 2)
    args = (*tensors.values(), made["blocks"], *[None] * 6, 1, 16, True, 2, 1, 0.4)
    torch.library.opcheck(torch.ops.zoo.block_sparse_attention_decode, args)
