"""Linear attention's Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from packing import packed

from zoo.kernels import dispatch
from zoo.kernels.linear_attention import linear_attention

CHUNK = 16  # in these tests


def inputs(b, t, h, hv, k, v, decay=None, *, n=None, strongest=0.5, columns=False, bonus=None, normalize=None):
    """Tensors of a call in fp32; log decays between -strongest and 0."""
    random = torch.randn if normalize is None else torch.rand
    tensors = {name: random(b, t, h, k) for name in ("q", "k")} | {"v": torch.randn(b, t, hv, v)}
    forms = {"head": (hv,), "token": (b, t, hv), "channel": (b, t, hv, k), "fixed channel": (hv, k)}
    if decay is not None:
        tensors["decay"] = -strongest * torch.rand(forms[decay])
    if columns:
        tensors["value_decay"] = -strongest * torch.rand(b, t, hv, v)
    if bonus is not None:
        tensors["bonus"] = torch.randn((hv,) if bonus == "head" else (hv, k))
    return tensors | {"initial_state": random(n or b, hv, k, v + (normalize is not None))}


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ((300, 4), {}, "K up to 256"),
        ((4, 600), {}, "V up to 512"),
        ((4, 300), {"columns": True}, "V up to 256"),
        ((4, 4), {"columns": True, "decay": "channel"}, "by itself"),
    ],
)
def test_unsupported_calls_are_refused_and_run_elsewhere(sizes, options, reason):
    tensors = inputs(1, 3, 1, 1, *sizes, **options)
    with pytest.raises(ValueError, match=reason):
        linear_attention(**tensors, backend="triton")
    linear_attention(**tensors)


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    """Sequences of more than two chunks are cut, as long ones are on a device; small chunks save time."""
    monkeypatch.setattr("zoo.kernels.linear_attention.triton.chunk_size", lambda *_: CHUNK)
    monkeypatch.setattr("zoo.kernels.linear_attention.triton.segment_size", lambda *_: 2 * CHUNK)


@pytest.fixture
def check(evaluate, assert_close):
    def run(tensors, rms=1e-5, **options):
        options |= {"output_final_state": True, "scale": 0.3}
        exact = {name: x.double() for name, x in tensors.items()}
        expected = evaluate(linear_attention, exact, backend="reference", **options)
        assert_close(evaluate(linear_attention, tensors, backend="triton", **options), expected, rms)

    return run


@pytest.mark.parametrize("decay", [None, "head", "token", "channel", "fixed channel"])
def test_values_state_and_gradients(check, decay):
    # The gradient of a decay without tokens is a sum over them that may cancel.
    check(
        inputs(1, 2 * CHUNK + 7, 1, 1 + (decay == "token"), 12, 20, decay),
        rms=1e-4 if decay in ("head", "fixed channel") else 1e-5,
    )


@pytest.mark.parametrize("t", [1, CHUNK, 2 * CHUNK])
def test_lengths(check, t):
    check(inputs(1, t, 1, 1, 8, 8, "token"))


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_packed_sequences(check, decay):
    options, t, n = packed(0, 1, 2 * CHUNK + 1, 0)
    check(inputs(1, t, 1, 1, 8, 8, decay, n=n), **options)


def test_packed_without_tokens():
    options, t, n = packed(0, 0)
    tensors = inputs(1, t, 1, 1, 8, 8, "channel", n=n)
    _, state = linear_attention(**tensors, **options, output_final_state=True, backend="triton")
    assert torch.equal(state, tensors["initial_state"])


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_tiles_of_wide_keys_and_values(check, decay):
    check(inputs(1, CHUNK + 3, 1, 1, 70, 70, decay))


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_strong_decay_and_total_forgetting(check, decay):
    tensors = inputs(1, 2 * CHUNK + 2, 1, 1, 8, 8, decay, strongest=30.0)
    tensors["decay"][:, 5::9] = -1e4
    check(tensors)


def test_gradient_of_strong_decay_is_no_difference_of_large_sums(evaluate, assert_close):
    """Operands in bf16: what passes a token is far less than what its neighbours read and write themselves."""
    tensors = inputs(1, 2 * CHUNK, 1, 1, 16, 16, "channel", strongest=30.0)
    tensors = {name: x.to(torch.bfloat16) if name in ("q", "k", "v") else x for name, x in tensors.items()}
    exact = {name: x.double() for name, x in tensors.items()}
    expected = evaluate(linear_attention, exact, backend="reference")
    assert_close(evaluate(linear_attention, tensors, backend="triton"), expected, 5e-3)


@pytest.mark.parametrize("decay", [None, "channel"])
def test_normalised(check, decay):
    check(inputs(1, 2 * CHUNK + 3, 1, 1, 8, 8, decay, normalize="sum"), normalize="sum")


def test_decay_on_the_value_axis(check):
    options, t, n = packed(0, 1, 2 * CHUNK + 3)
    check(inputs(1, t, 1, 1, 8, 6, columns=True, n=n), rms=1e-4, **options)


@pytest.mark.parametrize(("decay", "bonus"), [("channel", "channel"), ("token", "head")])
def test_bonus(check, decay, bonus):
    options, t, n = packed(0, 1, 9)
    check(inputs(1, t, 1, 2, 8, 6, decay, bonus=bonus, n=n), **options)


def test_normalised_with_bonus(check):
    tensors = inputs(2, 9, 1, 1, 8, 6, "token", bonus="channel", normalize="sum")
    check(tensors, normalize="sum", rms=1e-4)


def test_chunks_of_bf16(check, monkeypatch, size=64):
    monkeypatch.setattr("zoo.kernels.linear_attention.triton.chunk_size", lambda *_: size)
    monkeypatch.setattr("zoo.kernels.linear_attention.triton.segment_size", lambda *_: 128)
    check(inputs(1, size + 1, 1, 1, 8, 8, "channel"))


def test_cutting_changes_no_more_than_rounding(evaluate, assert_close, monkeypatch):
    tensors = inputs(2, 3 * CHUNK, 1, 1, 8, 8, "token")
    cut = evaluate(linear_attention, tensors, backend="triton", output_final_state=True)
    monkeypatch.setattr("zoo.kernels.linear_attention.triton.segment_size", lambda *_: 4 * CHUNK)
    assert_close(evaluate(linear_attention, tensors, backend="triton", output_final_state=True), cut, 1e-6)
    alone = {name: x[:1] for name, x in tensors.items()}
    assert torch.equal(linear_attention(**alone, backend="triton")[0], linear_attention(**tensors)[0][:1])


def test_strided_inputs_and_missing_gradients():
    tensors = inputs(1, 20, 1, 1, 16, 8, "token")
    q, k = (x.requires_grad_() for x in torch.cat([tensors["q"], tensors["k"]], -1).split(16, -1))
    both = [linear_attention(q, k, tensors["v"], tensors["decay"], backend=name)[0] for name in ("reference", "triton")]
    want, have = (torch.autograd.grad(o.sum(), (q, k)) for o in both)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"decay": "token", "normalize": "sum"}, {"columns": True}])
def test_compiles_as_one_graph(evaluate, assert_close, options):
    tensors = inputs(1, 20, 1, 1, 8, 8, **options)
    options = {"backend": "triton", "output_final_state": True, "normalize": options.get("normalize")}
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    assert_close(evaluate(compiled, tensors, **options), evaluate(linear_attention, tensors, **options), 1e-7)


@pytest.mark.slow
def test_operator_contract():
    q, k, v, decay = [x.requires_grad_() for x in inputs(1, 5, 1, 2, 8, 8, "token").values()][:4]
    gain, cu_seqlens = torch.full_like(decay, -0.5).requires_grad_(), torch.tensor([0, 2, 5], dtype=torch.int32)
    args = (q, k, v, decay, gain, True, 0.5, None, cu_seqlens, True)
    torch.library.opcheck(torch.ops.zoo.linear_attention, args)


@pytest.mark.slow
def test_operator_contract_of_value_decay():
    *parts, decay = (-torch.rand(1, 5, 1, 8) for _ in range(4))
    state = torch.randn(1, 1, 8, 8, requires_grad=True)
    args = (*(x.requires_grad_() for x in (*parts, decay)), 0.5, state, None)
    torch.library.opcheck(torch.ops.zoo.linear_attention_columns, args)


def test_automatic_choice():
    assert next(iter(dispatch.backends("linear_attention"))) == "triton"
