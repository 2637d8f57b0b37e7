"""Diagonal state spaces: backends against the token loop and against Mamba, S4D and the delta rule; memory.

Shapes: B batch, T tokens, N sequences, D channels, n states per channel, G groups of channels.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.kernels import dispatch
from zoo.kernels.delta_rule import delta_rule
from zoo.kernels.selective_scan import selective_scan, selective_scan_step

BACKENDS = [name for name in dispatch.backends("selective_scan") if name not in ("reference", "triton")]
KINDS = ["mamba", "groups", "s4d", "complex", "complex tokens", "longhorn", "plain"]
PACKED = [0, 0, 1, 34, 34, 70]


def inputs(kind, t, *, b=2, n=None, strength=1.0, dtype=torch.float64, d=4, states=3):
    """The tensors of a call; what a kind lacks is None."""
    complex_a = kind.startswith("complex")
    wide = dtype.to_complex() if complex_a else dtype
    forms = {"groups": (b, t, 2, states), "s4d": (d, states), "complex": (d, states)}
    shape, projection = forms.get(kind, (b, t, states)), dtype if kind == "complex tokens" else wide
    real = -strength * torch.rand(d, states, dtype=dtype)
    return {
        "x": torch.randn(b, t, d, dtype=dtype),
        "dt": torch.rand(b, t, d, dtype=dtype) / (states if kind == "longhorn" else 1),
        "A": None if kind == "longhorn" else torch.complex(real, torch.randn_like(real)) if complex_a else real,
        "B": torch.rand(shape, dtype=projection),
        "C": torch.randn(shape, dtype=projection),
        "D": None if kind == "plain" else torch.randn(d, dtype=dtype),
        "initial_state": None if kind == "plain" else torch.randn(n or b, d, states, dtype=wide),
    }


def op(A=None, D=None, initial_state=None, **arguments):
    """Without A it is Longhorn's."""
    transition = "longhorn" if A is None else "mamba"
    return selective_scan(A=A, D=D, initial_state=initial_state, transition=transition, **arguments)


def cut(tensors, begin, end):
    t = tensors["x"].shape[1]
    tokens = {"x", "dt", "B", "C"}
    return {
        name: x[:, begin:end] if name in tokens and x.dim() > 2 and x.shape[1] == t else x
        for name, x in tensors.items()
    }


def results(evaluate, tensors, **options):
    """Values and gradients, complex ones as pairs of real numbers."""
    real = {name: x if x is None or not x.is_complex() else torch.view_as_real(x) for name, x in tensors.items()}

    def run(**leaves):
        back = {name: torch.view_as_complex(x) if tensors[name].is_complex() else x for name, x in leaves.items()}
        y, state = op(**back, **options)
        return y, torch.view_as_real(state) if state is not None and state.is_complex() else state

    return evaluate(run, real)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 2, 31, 33, 100])
def test_backend_equals_the_token_loop(backend, kind, t, evaluate, assert_close):
    tensors = inputs(kind, t)
    expected = results(evaluate, tensors, output_final_state=True, backend="reference")
    assert_close(results(evaluate, tensors, output_final_state=True, backend=backend), expected, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mamba", "complex"])
@pytest.mark.parametrize("strength", [30.0, 1e4])
def test_strong_decay(backend, kind, strength, evaluate, assert_close):
    tensors = inputs(kind, 70, strength=strength)
    expected = results(evaluate, tensors, output_final_state=True, backend="reference")
    assert_close(results(evaluate, tensors, output_final_state=True, backend=backend), expected, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_the_token_loop(backend, kind, evaluate, assert_close):
    tensors = inputs(kind, PACKED[-1], b=1, n=len(PACKED) - 1)
    options = {"output_final_state": True, "cu_seqlens": torch.tensor(PACKED, dtype=torch.int32)}
    expected = results(evaluate, tensors, backend="reference", **options)
    assert_close(results(evaluate, tensors, backend=backend, **options), expected, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate(backend):
    tensors = inputs("mamba", PACKED[-1], b=1, n=len(PACKED) - 1)
    options = {"output_final_state": True, "backend": backend}
    y, state = op(**tensors, cu_seqlens=torch.tensor(PACKED, dtype=torch.int32), **options)
    for n, (begin, end) in enumerate(zip(PACKED, PACKED[1:], strict=False)):
        before = tensors["initial_state"][n : n + 1]
        if begin == end:
            assert torch.equal(state[n : n + 1], before)
            continue
        single, final = op(**cut(tensors, begin, end) | {"initial_state": before}, **options)
        torch.testing.assert_close(y[:, begin:end], single, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state[n : n + 1], final, rtol=1e-12, atol=1e-12)


def test_only_empty_sequences():
    tensors = inputs("mamba", 0, b=1, n=2)
    y, state = op(**tensors, output_final_state=True, cu_seqlens=torch.zeros(3, dtype=torch.int32))
    assert y.shape == (1, 0, 4) and torch.equal(state, tensors["initial_state"])


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_then_rest_equals_whole(kind, assert_close):
    tensors = inputs(kind, 70)
    y, state = op(**tensors, output_final_state=True)
    first, middle = op(**cut(tensors, 0, 41), output_final_state=True)
    second, end = op(**cut(tensors, 41, 70) | {"initial_state": middle}, output_final_state=True)
    end, state = (torch.view_as_real(x) if x.is_complex() else x for x in (end, state))
    assert_close({"y": torch.cat([first, second], 1), "state": end}, {"y": y, "state": state}, 1e-12)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_steps_equal_the_op(kind):
    tensors = inputs(kind, 9)
    y, final = op(**tensors, output_final_state=True)
    state = tensors.pop("initial_state").clone()
    transition = "longhorn" if kind == "longhorn" else "mamba"
    found = [selective_scan_step(**cut(tensors, t, t + 1), state=state, transition=transition) for t in range(9)]
    torch.testing.assert_close(torch.cat(found, 1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_equals_mamba_of_transformers(evaluate, assert_close):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    tensors = inputs("mamba", 70, dtype=torch.float32)
    del tensors["initial_state"]

    def theirs(x, dt, A, B, C, D):
        swapped = (x.mT, dt.mT, A, B.mT, C.mT, D)
        y, state = mamba_selective_scan(*swapped, return_last_state=True)
        return y.mT, state

    assert_close(evaluate(op, tensors, output_final_state=True), evaluate(theirs, tensors), 1e-5, 1e-4)


def test_constant_steps_are_the_convolution_of_s4d():
    tensors = inputs("complex", 50)
    tensors |= {"dt": tensors["dt"][:1, :1].expand(2, 50, -1), "initial_state": None}
    y, _ = op(**tensors)
    dt, powers = tensors["dt"][0, 0, :, None, None], torch.arange(50, dtype=torch.float64)
    kernel = (tensors["C"] * tensors["B"])[..., None] * (dt * tensors["A"][..., None] * powers).exp() * dt
    length = 100
    spectrum = torch.fft.rfft(kernel.sum(1).real, length) * torch.fft.rfft(tensors["x"].mT, length)
    expected = torch.fft.irfft(spectrum, length)[..., :50].mT + tensors["D"] * tensors["x"]
    torch.testing.assert_close(y, expected)


def test_longhorn_with_one_state_is_the_delta_rule():
    tensors = inputs("longhorn", 40, d=3, states=1)
    tensors |= {"D": None, "initial_state": None}
    y, state = op(**tensors, output_final_state=True)
    q, k = (tensors[name].unsqueeze(2) for name in ("C", "B"))
    o, end = delta_rule(q, k, tensors["x"].unsqueeze(-1), tensors["dt"], scale=1.0, output_final_state=True)
    torch.testing.assert_close(y, o.squeeze(-1))
    torch.testing.assert_close(state, end.squeeze(-1))


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("kind", ["mamba", "s4d", "longhorn"])
def test_never_expands_all_tokens(kind):
    tensors = inputs(kind, 1024, b=1, d=2, states=64, dtype=torch.float32)
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if x is not None}
    with Largest() as largest:
        op(**leaves)[0].sum().backward()
    assert largest.numel <= 1024 * 2 * 64 / 2


def test_bf16_sums_in_fp32(evaluate, assert_close):
    low = inputs("mamba", 200, strength=0.1, dtype=torch.float32)
    low |= {name: low[name].bfloat16() for name in "xBC"}
    exact = {name: x.double() for name, x in low.items()}
    found, expected = (evaluate(op, x, output_final_state=True) for x in (low, exact))
    assert found["output 0"].dtype == torch.bfloat16 and found["output 1"].dtype == torch.float32
    assert_close(found, expected, 5e-3, 2e-2)


@pytest.mark.parametrize("kind", ["mamba", "longhorn"])
def test_gradcheck(kind):
    tensors = {n: x.requires_grad_() for n, x in inputs(kind, 5, d=2).items() if x is not None}
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *leaves: op(**dict(zip(names, leaves, strict=True)), output_final_state=True),
        tuple(tensors.values()),
        fast_mode=True,
    )


# torch's own tracer instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph(evaluate, assert_close):
    tensors = inputs("mamba", 33, b=1, n=2, dtype=torch.float32)
    options = {"cu_seqlens": torch.tensor([0, 1, 33], dtype=torch.int32)}
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=False)
    found = evaluate(compiled, tensors, output_final_state=True, **options)
    assert_close(found, evaluate(op, tensors, output_final_state=True, **options), 1e-6)


BAD = [
    ({"x": torch.randn(1, 4)}, "x has shape"),
    ({"dt": torch.rand(1, 4, 3)}, "dt has shape"),
    ({"dt": torch.rand(1, 4, 4).bfloat16()}, "dt has dtype torch.bfloat16"),
    ({"A": None}, "A is NoneType"),
    ({"A": torch.rand(4, 2)}, "A has shape"),
    ({"B": torch.rand(1, 5, 3)}, "B has shape"),
    ({"B": torch.rand(1, 4, 3, 3)}, "B has shape"),
    ({"C": torch.rand(1, 4, 2)}, "C has shape"),
    ({"C": torch.rand(1, 4, 3, dtype=torch.complex64)}, "C has dtype torch.complex64"),
    ({"D": torch.rand(5)}, "D has shape"),
    ({"transition": "s6"}, "transition is 's6'"),
    ({"transition": "longhorn"}, "A is given"),
    ({"initial_state": torch.zeros(1, 4, 2)}, "initial_state has shape"),
    ({"initial_state": torch.zeros(1, 4, 3, dtype=torch.complex64)}, "initial_state has dtype torch.complex64"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_argument_is_named(change, message):
    tensors = inputs("mamba", 4, b=1, dtype=torch.float32)
    selective_scan(**tensors)
    with pytest.raises(ValueError) as caught:
        selective_scan(**tensors | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_autocast_leaves_steps_and_states_in_fp32():
    tensors = inputs("mamba", 40, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = op(**tensors, output_final_state=True)
    low = {name: x.bfloat16() if name in "xBC" else x for name, x in tensors.items()}
    expected, end = op(**low, output_final_state=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(y, expected) and torch.equal(state, end)
