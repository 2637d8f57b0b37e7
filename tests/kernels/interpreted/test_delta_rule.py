"""The delta rule's Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from packing import packed

from zoo.kernels import dispatch
from zoo.kernels.delta_rule import delta_rule
from zoo.kernels.delta_rule.triton import segment_size

CHUNK = 32  # of fp32 inputs


def inputs(b, t, h, hv, k, v, decay=None, *, n=None, strongest=0.5, normalized=True):
    """Tensors of a call in fp32; log decays between -strongest and 0."""
    tensors = {name: torch.randn(b, t, h, k) for name in ("q", "k")} | {"v": torch.randn(b, t, hv, v)}
    if normalized:
        tensors["k"] = torch.nn.functional.normalize(tensors["k"], dim=-1)
    tensors["beta"] = 2 * torch.rand(b, t, hv)
    if decay is not None:
        tensors["decay"] = -strongest * torch.rand({"head": (hv,), "token": (b, t, hv)}[decay])
    return tensors | {"initial_state": torch.randn(n or b, hv, k, v)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.zeros(1, 3, 1, 300), "k": torch.zeros(1, 3, 1, 300)}, "K up to 256"),
        ({"v": torch.zeros(1, 3, 2, 600)}, "V up to 512"),
    ],
)
def test_unsupported_calls_are_refused_and_run_elsewhere(change, reason):
    tensors = {name: x for name, x in inputs(1, 3, 2, 2, 4, 4).items() if name != "initial_state"} | change
    tensors["q"], tensors["k"] = (tensors[name].expand(1, 3, 2, -1) for name in ("q", "k"))
    with pytest.raises(ValueError, match=reason):
        delta_rule(**tensors, backend="triton")
    delta_rule(**tensors)


def test_fp64_is_refused():
    tensors = {name: x.double() for name, x in inputs(1, 3, 1, 1, 4, 4).items()}
    with pytest.raises(ValueError, match="fp64"):
        delta_rule(**tensors, backend="triton")


@pytest.fixture
def check(evaluate, assert_close):
    def run(tensors, rms=1e-5, **options):
        options["output_final_state"] = True
        exact = {name: x.double() for name, x in tensors.items()}
        expected = evaluate(delta_rule, exact, backend="reference", **options)
        assert_close(evaluate(delta_rule, tensors, backend="triton", **options), expected, rms)

    return run


@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("norm", [False, True])
def test_values_state_and_gradients(check, decay, norm):
    tensors = inputs(1, CHUNK + 7, 1, 2, 12, 20, decay, normalized=not norm)
    check(tensors, qk_l2norm=norm, scale=0.7)


@pytest.mark.parametrize("t", [1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_lengths_around_a_chunk(check, t):
    check(inputs(1, t, 1, 1, 16, 16, "token"))


def test_batch_and_grouped_value_heads(check):
    check(inputs(2, CHUNK + 3, 1, 2, 16, 8, "token", normalized=False), qk_l2norm=True)


def test_tiles_of_wide_values_and_keys(check):
    check(inputs(1, CHUNK + 3, 1, 1, 70, 70, "token"))


@pytest.mark.parametrize("decay", ["head", "token"])
def test_packed_sequences(check, decay):
    options, t, n = packed(0, 1, CHUNK + 5, 0, CHUNK, 3, 0)
    check(inputs(1, t, 1, 1, 16, 16, decay, n=n), **options)


def test_packed_without_tokens(check):
    options, t, n = packed(0, 0)
    tensors = inputs(1, t, 1, 1, 16, 16, n=n)
    _, state = delta_rule(**tensors, **options, output_final_state=True, backend="triton")
    assert torch.equal(state, tensors["initial_state"])


@pytest.fixture
def cut(monkeypatch):
    """Cuts sequences after every so many tokens, as long ones with few heads are."""

    def set_size(tokens):
        monkeypatch.setattr("zoo.kernels.delta_rule.triton.segment_size", lambda *_: tokens)

    return set_size


@pytest.mark.parametrize(("decay", "hv", "k", "v", "chunks"), [(None, 2, 12, 20, 1), ("token", 1, 16, 16, 2)])
def test_segments(check, cut, decay, hv, k, v, chunks):
    cut(chunks * CHUNK)
    check(inputs(1, 2 * chunks * CHUNK + 5, 1, hv, k, v, decay))


def test_packed_sequences_of_segments(check, cut):
    cut(CHUNK)
    options, t, n = packed(0, CHUNK, 1, 3 * CHUNK - 1, 0)
    check(inputs(1, t, 1, 1, 16, 16, "token", n=n), **options)


def test_segments_do_not_depend_on_the_batch(cut):
    cut(CHUNK)
    tensors = {
        name: x for name, x in inputs(2, 3 * CHUNK + 9, 1, 1, 16, 16, "token").items() if name != "initial_state"
    }

    def run(parts):
        leaves = [x.requires_grad_() for x in parts.values()]
        o, state = delta_rule(**parts, backend="triton", output_final_state=True)
        return o, state, *torch.autograd.grad(o.square().sum() + state.sum(), leaves)

    alone = run({name: x[:1].clone() for name, x in tensors.items()})
    assert all(torch.equal(x, y[:1]) for x, y in zip(alone, run(tensors), strict=True))


def test_segments_are_whole_chunks_of_long_calls_with_few_heads():
    assert segment_size(2048, 1, 64) >= 2048 and segment_size(10**5, 256, 64) >= 10**5
    assert segment_size(8192, 8, 128) == 1024
    assert all(segment_size(t, 2, 64) % 64 == 0 for t in (1, 2049, 5000))


def test_packed_equals_apart():
    options, t, n = packed(CHUNK + 5, 9)
    tensors = {name: x for name, x in inputs(1, t, 1, 1, 16, 16, "token").items() if name != "initial_state"}
    together, _ = delta_rule(**tensors, **options, backend="triton")
    cuts = [0, CHUNK + 5, t]
    parts = [{name: x[:, i:j] for name, x in tensors.items()} for i, j in zip(cuts, cuts[1:], strict=False)]
    apart = torch.cat([delta_rule(**part, backend="triton")[0] for part in parts], 1)
    assert torch.equal(together, apart)


def test_gradient_of_strong_decays_per_head(check):
    """It is tiny, and what it is summed from is not."""
    tensors = inputs(1, CHUNK + 9, 2, 2, 16, 16, "head")
    check(tensors | {"decay": torch.tensor([-7.0, -25.0])})


def test_strong_decay_and_total_forgetting(check):
    tensors = inputs(1, 2 * CHUNK, 1, 1, 16, 16, "token", strongest=30.0)
    check(tensors)
    tensors["decay"][:, 5::9] = -1e4
    check(tensors, rms=2e-5)


def test_hard_inverse(check):
    """All keys alike make powers of the triangular matrix explode; its inverse is tame."""
    tensors = inputs(1, 2 * CHUNK, 1, 1, 16, 16)
    tensors["k"], tensors["beta"] = torch.ones_like(tensors["k"]) / 4, torch.full_like(tensors["beta"], 1.9)
    check(tensors, rms=5e-5)


def test_zero_keys_and_zero_beta(check):
    tensors = inputs(1, CHUNK + 2, 1, 1, 16, 16, "token")
    tensors["k"][:, 3:20], tensors["beta"][:, 10:30] = 0.0, 0.0
    check(tensors, qk_l2norm=True, rms=2e-5)


@pytest.mark.parametrize("size", [16, 64])
def test_other_chunks(check, monkeypatch, size):
    """bf16 has chunks of 64, and its own arithmetic exists on a device alone."""
    monkeypatch.setattr("zoo.kernels.delta_rule.triton.chunk_size", lambda *_: size)
    check(inputs(1, 64 + 9, 1, 1, 16, 16, "token"))


@pytest.mark.parametrize(("dtype", "rms"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_inputs(evaluate, assert_close, dtype, rms):
    tensors = inputs(1, CHUNK + 9, 1, 1, 16, 16, "token")
    tensors = {name: x.to(dtype) if name in ("q", "k", "v") else x for name, x in tensors.items()}
    exact = {name: x.double() for name, x in tensors.items()}
    expected = evaluate(delta_rule, exact, backend="reference", output_final_state=True)
    found = evaluate(delta_rule, tensors, backend="triton", output_final_state=True)
    assert found["output 0"].dtype == dtype
    assert_close(found, expected, rms)


def test_strided_inputs_and_missing_gradients(check):
    tensors = inputs(1, 20, 1, 1, 16, 16)
    wide = torch.cat([tensors["q"], tensors["k"]], -1)
    q, k = (x.requires_grad_() for x in wide.split(16, -1))
    (plain,) = delta_rule(q, k, tensors["v"], tensors["beta"], backend="reference")[:1]
    o, state = delta_rule(q, k, tensors["v"], tensors["beta"], backend="triton")
    assert state is None
    want = torch.autograd.grad(plain.sum(), (q, k))
    for have, grad in zip(torch.autograd.grad(o.sum(), (q, k)), want, strict=True):
        torch.testing.assert_close(have, grad, rtol=1e-4, atol=1e-5)


def test_gradient_of_the_state_alone(evaluate, assert_close):
    def final(q, k, v, beta, decay, initial_state, backend):
        state = (q, k, v, beta, decay)
        return delta_rule(*state, initial_state=initial_state, output_final_state=True, backend=backend)[1]

    tensors = inputs(1, CHUNK + 2, 1, 1, 16, 16, "token")
    expected = evaluate(final, tensors, backend="reference")
    found = evaluate(final, tensors, backend="triton")
    assert not found.pop("q").any() and not expected.pop("q").any()
    assert_close(found, expected, 1e-5)


def test_compiles_as_one_graph(evaluate, assert_close):
    tensors = inputs(1, 20, 1, 1, 16, 16, "token")
    options = {"backend": "triton", "output_final_state": True, "qk_l2norm": True}
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")
    assert_close(evaluate(compiled, tensors, **options), evaluate(delta_rule, tensors, **options), 1e-7)


@pytest.mark.slow
def test_operator_contract():
    tensors = inputs(1, 5, 1, 2, 16, 16, "token")
    leaves = [x.requires_grad_() for x in tensors.values()]
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.zoo.delta_rule, (*leaves[:5], True, 0.5, None, cu_seqlens, True))


def test_automatic_choice():
    assert next(iter(dispatch.backends("delta_rule"))) == "triton"
