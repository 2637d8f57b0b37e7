"""Attention's Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from zoo.kernels import dispatch, launch
from zoo.kernels.attention import PADDING, attention
from zoo.kernels.attention import triton as backend

MASKS = [
    {},
    {"window": 19},
    {"window": 19, "causal": False},
    {"window": 17, "sink_tokens": 3},
    {"chunk": 40, "causal": False},
    {"chunk": 8, "sink_tokens": 20},
    {"window": 3, "stride": 5},
    {"window": 5, "dilation": 4},
    {"chunk": 9, "dilation": 3},
    {"dilation": 3, "sink_tokens": 2},
]
SOME = [{"causal": False}, {"window": 9, "sink_tokens": 2}, {"chunk": 12}, {"stride": 5}]


def inputs(tq, tk=None, h=1, hk=1, k=16, v=16, *, b=1, sink=False):
    tk = tk or tq
    made = {"q": torch.randn(b, tq, h, k), "k": torch.randn(b, tk, hk, k), "v": torch.randn(b, tk, hk, v)}
    return made | ({"sink_logits": torch.randn(h)} if sink else {})


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        (inputs(3, k=257), {}, "up to 256 and 256"),
        ({name: x.bfloat16() for name, x in inputs(3, v=513).items()}, {}, "up to 256 and 512"),
        (inputs(3), {"scale": -1.0}, "must be positive"),
        ({name: x.double() for name, x in inputs(3).items()}, {}, "fp64"),
    ],
    ids=["K", "V", "scale", "fp64"],
)
def test_unsupported_calls_are_refused_and_run_elsewhere(tensors, options, reason):
    with pytest.raises(ValueError, match=reason):
        attention(**tensors, **options, backend="triton")
    attention(**tensors, **options)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """So that few tokens fill many blocks, some of them seen whole, as on the device with bf16."""
    tiles = {"BM": 32, "BN": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(launch, "choice", lambda *_: tiles)


@pytest.fixture
def check(evaluate, assert_close):
    def run(tensors, rms=1e-5, **options):
        exact = {name: x.double() for name, x in tensors.items()}
        expected = evaluate(attention, exact, backend="chunked", return_lse=True, **options)
        assert_close(evaluate(attention, tensors, backend="triton", return_lse=True, **options), expected, rms)

    return run


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks(check, mask):
    check(inputs(45), **mask)


@pytest.mark.parametrize(
    ("tq", "tk", "mask"),
    [(20, 75, {"window": 19}), (50, 33, {"window": 19}), (50, 33, {"chunk": 20, "causal": False})],
    ids=str,
)
def test_more_or_fewer_queries_than_keys(check, tq, tk, mask):
    check(inputs(tq, tk), **mask)


def test_softcap_sink_logits_and_groups(check):
    check(inputs(33, None, 2, 1, 12, 20, sink=True), softcap=3.0, scale=0.7)


@pytest.mark.parametrize("enough", [0, 10_000])
def test_groups_together_and_apart(check, monkeypatch, enough):
    monkeypatch.setattr(backend, "WIDE_ENOUGH", enough)
    check(inputs(17, None, 2, 1), window=18)


@pytest.mark.parametrize(("t", "k", "v"), [(1, 3, 5), (16, 16, 40), (33, 40, 16)])
def test_lengths_and_widths(check, t, k, v):
    check(inputs(t, t, 1, 1, k, v))


@pytest.mark.parametrize("mask", SOME, ids=str)
def test_positions_and_padding(check, mask):
    """Left padding of 0 and 20, whose keys are never seen."""
    places = torch.arange(34) - torch.tensor([[0], [20]])
    keys = torch.where(places < 0, PADDING, places)
    check(inputs(16, 34, b=2), q_positions=places[:, -16:], k_positions=keys, **mask)


def test_positions_in_no_order(check):
    check(inputs(34), q_positions=torch.randperm(34) - 4, window=9)


@pytest.mark.parametrize("mask", SOME[1:], ids=str)
def test_packed_sequences(check, mask):
    ends = torch.tensor([0, 0, 1, 36, 36, 40], dtype=torch.int32)
    check(inputs(40), cu_seqlens=ends, **mask)


def test_packed_with_positions(check):
    ends = torch.tensor([0, 18, 37], dtype=torch.int32)
    check(inputs(37, sink=True), cu_seqlens=ends, q_positions=torch.arange(37) % 25, window=12)


def test_packed_without_tokens():
    tensors = {name: x[:, :0] for name, x in inputs(1).items()}
    ends = torch.tensor([0, 0], dtype=torch.int32)
    assert attention(**tensors, cu_seqlens=ends, backend="triton").shape == (1, 0, 1, 16)


def test_blind_rows_are_zero_with_zero_gradient(evaluate):
    tensors = inputs(20, sink=True)
    at = {"q_positions": torch.arange(20) - 17}
    found = evaluate(attention, tensors, backend="triton", return_lse=True, **at)
    assert not found["output 0"][:, :17].any() and not found["q"][:, :17].any()
    assert (found["output 1"][:, :17] == -torch.inf).all() and found["output 1"][:, 17:].isfinite().all()
    assert all(x.isfinite().all() for name, x in found.items() if name != "output 1")


def test_large_scores(check):
    tensors = inputs(40)
    check(tensors | {"q": 100 * tensors["q"]}, rms=1e-4, window=30)


def test_result_does_not_depend_on_the_batch():
    tensors = inputs(40, b=3)
    whole = attention(**tensors, window=9, backend="triton")
    assert torch.equal(whole[1:2], attention(**{n: x[1:2] for n, x in tensors.items()}, window=9, backend="triton"))


@pytest.mark.parametrize(("dtype", "rms"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_inputs(evaluate, assert_close, dtype, rms):
    tensors = {name: x.to(dtype) for name, x in inputs(40).items()}
    expected = evaluate(attention, {name: x.double() for name, x in tensors.items()}, window=9)
    found = evaluate(attention, tensors, window=9, backend="triton")
    assert found["output 0"].dtype == dtype
    assert_close(found, expected, rms)


def test_gradient_of_the_lse_alone_and_strided_inputs(evaluate, assert_close):
    def norms(q, k, v, backend):
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, window=9, return_lse=True, backend=backend)[1]

    tensors = inputs(40, None, 2, 2)
    found = evaluate(norms, tensors, backend="triton")
    assert not found["v"].any()
    assert_close(found, evaluate(norms, tensors, backend="reference"), 1e-5)


@pytest.mark.parametrize("options", [{"window": 3, "return_lse": True}, {"packed": True}], ids=str)
def test_compiles_as_one_graph(evaluate, assert_close, options):
    options = {"backend": "triton"} | options
    if options.pop("packed", False):
        options["cu_seqlens"] = torch.tensor([0, 3, 3, 20], dtype=torch.int32)
    tensors = inputs(20)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(evaluate(compiled, tensors, **options), evaluate(attention, tensors, **options), 1e-7)


@pytest.mark.slow
def test_operator_contract():
    leaves = [x.requires_grad_() for x in inputs(5, sink=True).values()]
    options = (True, 4, 1, None, None, None, 3.0, 0.5)
    torch.library.opcheck(torch.ops.zoo.attention, (*leaves, None, None, None, *options))


@pytest.mark.parametrize(
    ("options", "name"), [({}, "chunked"), ({"window": 4}, "triton"), ({"return_lse": True}, "triton")], ids=str
)
def test_automatic_choice(monkeypatch, options, name):
    torch.use_deterministic_algorithms(False)
    taken = []
    select = dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda *args: taken.append(select(*args).name) or select(*args))
    attention(**inputs(9), **options)
    assert taken == [name]
