"""Bad calls raise a ValueError that names the argument, before any work; dispatch honours its pins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import dispatch, test_time_training
from zoo.kernels.attention import attention
from zoo.kernels.block_sparse_attention import block_sparse_attention
from zoo.kernels.delta_rule import delta_rule, delta_rule_step
from zoo.kernels.dplr import dplr
from zoo.kernels.linear_attention import linear_attention
from zoo.kernels.mlstm import mlstm
from zoo.kernels.scan import scan
from zoo.kernels.selective_scan import selective_scan
from zoo.kernels.short_conv import short_conv, short_conv_step
from zoo.kernels.slstm import slstm
from zoo.kernels.weighted_average import weighted_average

SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=5).map(tuple)


def recurrent():
    x = torch.randn(1, 4, 2, 3)
    return {"q": x, "k": x, "v": x, "beta": torch.rand(1, 4, 2)}


def without_beta():
    return {name: x for name, x in recurrent().items() if name != "beta"}


def with_low_rank():
    x = torch.randn(1, 4, 2, 3)
    return without_beta() | {"a": -x, "b": x}


def with_gates():
    return without_beta() | {"input_gate": torch.randn(1, 4, 2), "forget_gate": torch.randn(1, 4, 2)}


def gates_alone():
    x = torch.randn(1, 4, 2, 3)
    names = ("cell_input", "input_gate", "forget_gate", "output_gate")
    return dict.fromkeys(names, x) | {"recurrent": torch.randn(4, 2, 3, 3)}


def elementwise(*names):
    return {name: -torch.rand(1, 4, 3) for name in names}


def state_space():
    x = torch.rand(1, 4, 3)
    return {"x": x, "dt": x, "A": -torch.rand(3, 2), "B": x[..., :2], "C": x[..., :2], "D": torch.randn(3)}


def inner_model():
    weights = {"W1": torch.randn(2, 3, 3), "b1": torch.randn(2, 3)}
    norm = {"norm_weight": torch.ones(2, 3), "norm_bias": torch.zeros(2, 3)}
    return without_beta() | {"lr": torch.rand(1, 4, 2), "weights": weights} | norm


def with_lists():
    blocks = torch.zeros(1, 2, 4, 2, dtype=torch.int32)
    return without_beta() | {"blocks": blocks, "counts": blocks[..., 0] + 1, "query_block": 1, "block": 16}


CALLS = {
    "scan": (scan, lambda: elementwise("x", "decay")),
    "selective_scan": (selective_scan, state_space),
    "weighted_average": (weighted_average, lambda: elementwise("k", "v", "decay")),
    "test_time_training": (test_time_training.test_time_training, inner_model),
    "dplr": (dplr, with_low_rank),
    "mlstm": (mlstm, with_gates),
    "slstm": (slstm, gates_alone),
    "delta_rule": (delta_rule, recurrent),
    "linear_attention": (linear_attention, without_beta),
    "attention": (attention, without_beta),
    "block_sparse_attention": (block_sparse_attention, with_lists),
    "short_conv": (short_conv, lambda: {"x": torch.randn(1, 4, 3), "weight": torch.randn(3, 2)}),
}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = [
    ("delta_rule", {"q": torch.randn(4, 2, 3)}, "q has shape"),
    ("delta_rule", {"k": torch.randn(1, 4, 2, 5)}, "k has shape"),
    ("delta_rule", {"v": torch.randn(1, 4, 3, 3)}, "v has 3 heads; it must be a positive multiple of the 2"),
    ("delta_rule", {"v": torch.randn(1, 4, 2, 3).double()}, "v has dtype torch.float64"),
    ("delta_rule", {"q": torch.ones(1, 4, 2, 3, dtype=torch.int64)}, "q has dtype torch.int64"),
    ("delta_rule", {"q": "text"}, "q is str; it must be a tensor"),
    ("delta_rule", {"beta": None}, "beta is NoneType"),
    ("delta_rule", {"beta": torch.rand(1, 4)}, "beta has shape"),
    ("delta_rule", {"beta": torch.rand(1, 4, 2).bfloat16()}, "beta has dtype torch.bfloat16"),
    ("delta_rule", {"decay": torch.rand(3)}, "decay has shape"),
    ("delta_rule", {"decay": torch.rand(2).double()}, "decay has dtype torch.float64"),
    ("delta_rule", {"scale": "large"}, "scale is str"),
    ("delta_rule", {"initial_state": torch.zeros(2, 2, 3, 3)}, "initial_state has shape"),
    ("delta_rule", {"q": torch.randn(1, 4, 2, 3, device="meta")}, "k is on cpu; it must be on meta"),
    ("linear_attention", {"value_decay": torch.rand(1, 4, 2)}, "value_decay has shape"),
    ("linear_attention", {"bonus": torch.rand(5)}, "bonus has shape"),
    ("linear_attention", {"normalize": "mean"}, "normalize is 'mean'"),
    ("linear_attention", {"normalize": "sum", "initial_state": torch.zeros(1, 2, 3, 3)}, "initial_state has shape"),
    ("linear_attention", {"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens has dtype torch.int64"),
    ("linear_attention", {"cu_seqlens": ints(4)}, "cu_seqlens has shape"),
    ("linear_attention", {"cu_seqlens": ints(1, 4)}, "cu_seqlens runs from 1 to 4"),
    ("linear_attention", {"cu_seqlens": ints(0, 3)}, "it must run from 0 to T = 4"),
    ("linear_attention", {"cu_seqlens": ints(0, 3, 2, 4)}, "must never decrease"),
    ("attention", {"window": 0}, "window is 0"),
    ("attention", {"chunk": 1.5}, "chunk is 1.5"),
    ("attention", {"sink_tokens": -1}, "sink_tokens is -1"),
    ("attention", {"softcap": 0.0}, "softcap is 0.0"),
    ("attention", {"sink_logits": torch.zeros(3)}, "sink_logits has shape"),
    ("attention", {"q_positions": torch.arange(3)}, "q_positions has shape"),
    ("attention", {"k_positions": torch.arange(4).float()}, "k_positions has dtype torch.float32"),
    ("attention", {"q": torch.randn(1, 3, 2, 3), "cu_seqlens": ints(0, 4)}, "with cu_seqlens both must have the same"),
    ("short_conv", {"weight": torch.randn(4, 2)}, "weight has shape"),
    ("short_conv", {"weight": torch.randn(3, 0)}, "weight has shape"),
    ("short_conv", {"bias": torch.randn(2)}, "bias has shape"),
    ("short_conv", {"activation": "gelu"}, "activation is 'gelu'"),
    ("short_conv", {"initial_state": torch.zeros(1, 2, 3)}, "initial_state has shape"),
    ("short_conv", {"initial_state": torch.zeros(1, 3, 2).half()}, "initial_state has dtype torch.float16"),
    ("short_conv", {"x": torch.randn(1, 0, 3)}, "T = 0"),
]


@pytest.mark.parametrize(("op", "change", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_argument_is_named(op, change, message):
    run, good = CALLS[op]
    run(**good())
    with pytest.raises(ValueError) as caught:
        run(**good() | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(op=st.sampled_from(sorted(CALLS)), shape=SHAPES, data=st.data())
def test_any_shape_runs_or_raises_value_error(op, shape, data):
    run, good = CALLS[op]
    arguments = good()
    name = data.draw(st.sampled_from(sorted(arguments)))
    arguments[name] = torch.ones(shape)
    try:
        result = run(**arguments)
    except ValueError:
        return
    o = result[0] if isinstance(result, tuple) else result
    assert o.isfinite().all()


def test_batches_are_not_packed():
    x = torch.randn(2, 4, 2, 3)
    with pytest.raises(ValueError, match="with cu_seqlens it must be 1"):
        linear_attention(x, x, x, cu_seqlens=ints(0, 4))


def test_boundaries_written_in_place_are_read_again():
    x, cu_seqlens = torch.randn(1, 4, 2, 3), ints(0, 4)
    linear_attention(x, x, x, cu_seqlens=cu_seqlens)
    cu_seqlens[1] = 3
    with pytest.raises(ValueError, match="runs from 0 to 3"):
        linear_attention(x, x, x, cu_seqlens=cu_seqlens)


def test_steps_take_one_token_and_their_state():
    arguments = recurrent()
    with pytest.raises(ValueError, match="exactly one token"):
        delta_rule_step(**arguments, state=torch.zeros(1, 2, 3, 3))
    arguments = {name: x[:, :1] for name, x in arguments.items()}
    with pytest.raises(ValueError, match="state has shape"):
        delta_rule_step(**arguments, state=torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="state has shape"):
        short_conv_step(torch.randn(1, 1, 3), torch.randn(3, 2), state=torch.zeros(1, 3, 3))


def test_every_op_has_a_reference_and_a_parallel_form():
    assert {"attention", "delta_rule", "linear_attention", "short_conv"} <= set(dispatch.ops())
    for op in dispatch.ops():
        names = list(dispatch.backends(op))
        assert {"chunked", "reference"} <= set(names)
        fastest = [name for name in dispatch.FASTEST_FIRST if name in names]
        assert names == fastest


def fake(name, reason):
    return dispatch.Backend(name, lambda *args: reason, lambda *args: name)


def test_selection_takes_the_fastest_that_supports_the_call():
    candidates = {
        "triton": fake("triton", "no GPU"),
        "chunked": fake("chunked", None),
        "reference": fake("reference", None),
    }
    assert dispatch.select(candidates, None, ()).name == "chunked"
    assert dispatch.select(candidates, "reference", ()).name == "reference"
    with pytest.raises(ValueError, match="'triton' cannot run this call: no GPU"):
        dispatch.select(candidates, "triton", ())
    with pytest.raises(ValueError, match=r"no backend can run this call \(triton: no GPU\)"):
        dispatch.select({"triton": candidates["triton"]}, None, ())


def test_pins_nest_and_the_environment_comes_last(monkeypatch):
    monkeypatch.setenv("ZOO_KERNELS", "reference")
    assert dispatch.pinned() == "reference"
    with dispatch.use("chunked"):
        assert dispatch.pinned() == "chunked"
        with dispatch.use("reference"):
            assert dispatch.pinned() == "reference"
        assert dispatch.pinned() == "chunked"
    monkeypatch.setenv("ZOO_KERNELS", "tritn")
    with pytest.raises(ValueError, match="backend is 'tritn'; this op has"):
        delta_rule(**recurrent())


def test_unknown_pin_is_refused():
    with pytest.raises(ValueError, match="backend is 'fast'"), dispatch.use("fast"):
        pass
    with pytest.raises(ValueError, match="backend is 'fast'"):
        attention(**without_beta(), backend="fast")
