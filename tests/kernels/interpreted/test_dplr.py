"""The Triton kernels of `dplr`, and of `delta_rule` with a decay per channel, against the references."""

from __future__ import annotations

import pytest
import torch
from packing import packed
from torch.nn.functional import normalize

from zoo.kernels.delta_rule import delta_rule
from zoo.kernels.dplr import dplr

CHUNK = 32  # of fp32 inputs


def inputs(op, b, t, h, hv, k, v, decay="channel", *, n=None, strongest=0.5):
    """Tensors of a call in fp32; log decays between -strongest and 0."""
    tensors = {"q": torch.randn(b, t, h, k), "k": normalize(torch.randn(b, t, h, k), dim=-1)}
    tensors["v"] = torch.randn(b, t, hv, v)
    if op == "dplr":
        kappa = normalize(torch.randn(b, t, h, k), dim=-1)
        tensors |= {"a": -kappa, "b": kappa * torch.rand(b, t, h, k)}
    else:
        tensors["beta"] = 2 * torch.rand(b, t, hv)
    shapes = {"head": (hv,), "head_channel": (hv, k), "token": (b, t, hv), "channel": (b, t, hv, k)}
    if decay is not None:
        tensors["decay"] = -strongest * torch.rand(shapes[decay])
    return tensors | {"initial_state": torch.randn(n or b, hv, k, v)}


def run(op, q, k, v, a=None, b=None, beta=None, decay=None, initial_state=None, *, backend, **options):
    options = {"scale": 0.7, "initial_state": initial_state, "output_final_state": True, "cu_seqlens": None} | options
    if op == "dplr":
        return dplr(q, k, v, a, b, decay, backend=backend, **options)
    if backend != "triton":
        return delta_rule(q, k, v, beta, decay, backend=backend, **options)
    from zoo.kernels.dplr import triton

    norm, *rest = (
        options.get(name, False) for name in ("qk_l2norm", "scale", "initial_state", "output_final_state", "cu_seqlens")
    )
    return triton.call(q, k, v, None, None, beta, decay, norm, *rest)


def test_unsupported_calls_are_refused():
    with pytest.raises(ValueError, match="K up to 256"):
        dplr(**inputs("dplr", 1, 1, 1, 1, 257, 4), backend="triton")
    with pytest.raises(ValueError, match="V up to 512"):
        dplr(**inputs("dplr", 1, 1, 1, 1, 4, 513), backend="triton")
    with pytest.raises(ValueError, match="fp64"):
        dplr(**{name: x.double() for name, x in inputs("dplr", 1, 1, 1, 1, 4, 4).items()}, backend="triton")


both = pytest.mark.parametrize("op", ["dplr", "delta_rule"])


@pytest.fixture
def check(evaluate, assert_close):
    def compare(op, tensors, rms=2e-6, **options):
        exact = {name: x.double() for name, x in tensors.items()}
        expected = evaluate(lambda **x: run(op, **x, backend="reference", **options), exact)
        assert_close(evaluate(lambda **x: run(op, **x, backend="triton", **options), tensors), expected, rms)

    return compare


@pytest.mark.parametrize(
    ("op", "decay"), [("dplr", None), ("dplr", "head"), ("dplr", "token"), ("delta_rule", "head_channel")]
)
def test_every_form_of_decay(check, op, decay):
    check(op, inputs(op, 1, CHUNK + 5, 1, 1, 12, 20, decay))


@both
def test_tiles_and_grouped_value_heads(check, op):
    check(op, inputs(op, 1, 5, 1, 2, 40, 40))


@both
@pytest.mark.parametrize("t", [1, CHUNK])
def test_lengths_around_a_chunk(check, op, t):
    check(op, inputs(op, 2 if t == 1 else 1, t, 1, 1, 16, 16))


@both
def test_packed_sequences(check, op):
    options, t, n = packed(0, 1, CHUNK + 5, 0, 3)
    check(op, inputs(op, 1, t, 1, 1, 16, 16, n=n), **options)


@pytest.fixture
def segments(monkeypatch):
    """Every chunk is one."""
    monkeypatch.setattr("zoo.kernels.dplr.triton.segment_size", lambda *_: CHUNK)


@pytest.mark.usefixtures("segments")
def test_segments(check):
    check("dplr", inputs("dplr", 1, 2 * CHUNK + 5, 1, 2, 20, 16))


@pytest.mark.usefixtures("segments")
def test_segments_of_packed_sequences(check):
    options, t, n = packed(0, 1, 2 * CHUNK + 5, 0, 3)
    check("delta_rule", inputs("delta_rule", 1, t, 1, 1, 16, 16, n=n), **options)


@pytest.mark.usefixtures("segments")
def test_no_result_depends_on_the_batch():
    tensors = inputs("dplr", 2, 2 * CHUNK + 3, 1, 1, 16, 16)
    both = run("dplr", **tensors, backend="triton")
    alone = run("dplr", **{name: x[1:] for name, x in tensors.items()}, backend="triton")
    assert all(torch.equal(one, two[1:]) for one, two in zip(alone, both, strict=True))


def test_segments_follow_from_tokens_and_heads():
    from zoo.kernels.dplr.triton import segment_size

    assert [segment_size(*shape) for shape in [(2048, 16, 128), (8192, 16, 128), (32768, 16, 128), (8192, 8, 128)]] == [
        2048,
        2048,
        4096,
        1024,
    ]


@pytest.mark.parametrize(("op", "limit"), [("dplr", 0.0), ("delta_rule", 80.0)])
def test_both_ways_to_scores(check, monkeypatch, op, limit):
    """Level by level, and, where a chunk's decay allows it, at once."""
    monkeypatch.setattr("zoo.kernels.dplr.triton.MILD", {torch.float32: limit})
    tensors = inputs(op, 1, 2 * CHUNK + 3, 1, 1, 40, 16, strongest=2.0)
    tensors["decay"][:, CHUNK:, :, 5] -= 4.0
    check(op, tensors, rms=1e-5)


@both
def test_strong_decay_and_total_forgetting(check, op):
    tensors = inputs(op, 1, CHUNK + 9, 1, 1, 16, 16, strongest=30.0)
    tensors["decay"][:, 5::9] = -1e4
    tensors["decay"][:, 6::9] = 0.0
    check(op, tensors)


def test_norms_zero_keys_and_zero_beta(check):
    tensors = inputs("delta_rule", 1, CHUNK + 2, 1, 1, 40, 16)
    tensors["q"] *= 3
    tensors["k"][:, 3:20], tensors["beta"][:, 10:30] = 0.0, 0.0
    check("delta_rule", tensors, qk_l2norm=True)


@both
def test_chunks_of_64(check, monkeypatch, op):
    """Those of bf16, whose own arithmetic exists on a device alone."""
    monkeypatch.setattr("zoo.kernels.dplr.triton.chunk_size", lambda *_: 64)
    check(op, inputs(op, 1, 64 + 9, 1, 1, 16, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(evaluate, assert_close, dtype):
    tensors = inputs("dplr", 1, CHUNK + 9, 1, 1, 16, 16)
    tensors = {name: x.to(dtype) if name in ("q", "k", "v", "a", "b") else x for name, x in tensors.items()}
    exact = {name: x.double() for name, x in tensors.items()}
    expected = evaluate(lambda **x: run("dplr", **x, backend="reference"), exact)
    found = evaluate(lambda **x: run("dplr", **x, backend="triton"), tensors)
    assert found["output 0"].dtype == dtype
    assert_close(found, expected, 1e-3 if dtype == torch.float16 else 1e-2)


def test_without_gradients_nothing_is_saved():
    tensors = inputs("dplr", 1, CHUNK + 2, 1, 1, 16, 16)
    expected = run("dplr", **tensors, backend="triton")
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    for have, want in zip(run("dplr", **leaves, backend="triton"), expected, strict=True):
        assert torch.equal(have, want)
    values = [tensors[name] for name in ("q", "k", "v", "a", "b")]
    bare = torch.ops.zoo.dplr(*values, None, None, False, 1.0, None, None, False)
    assert all(x.numel() == 0 for x in bare[2:])


def test_compiles_as_one_graph(evaluate, assert_close):
    tensors = inputs("dplr", 1, 20, 1, 1, 16, 16)
    options = {"backend": "triton", "output_final_state": True}
    compiled = torch.compile(dplr, fullgraph=True, backend="aot_eager")
    assert_close(evaluate(compiled, tensors, **options), evaluate(dplr, tensors, **options), 1e-7)


@pytest.mark.slow
def test_operator_contract():
    given = inputs("delta_rule", 1, 3, 1, 1, 16, 16)
    names = ("q", "k", "v", "a", "b", "beta", "decay")
    leaves = [given[name].requires_grad_() if name in given else None for name in names]
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    torch.library.opcheck(torch.ops.zoo.dplr, (*leaves, True, 0.5, None, cu_seqlens, True))
