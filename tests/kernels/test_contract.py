"""What every op and its step promise: bad arguments are named before any work, one graph under torch.compile and
torch.export, a step that is a well-formed operator.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths, D channels, n states.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.kernels import dispatch

D, K, V, HEADS = 6, 3, 5, (2, 4)
rand, randn = torch.rand, torch.randn


def matrix(b: int, t: int, n: int, v: int = V) -> dict[str, Any]:
    h, hv = HEADS
    return {"q": randn(b, t, h, K), "k": randn(b, t, h, K), "v": randn(b, t, hv, v)}


def state(n: int, *parts: tuple[int, ...]) -> dict[str, Any]:
    made = tuple(rand(n, *part) for part in parts)
    return {"initial_state": made[0] if len(parts) == 1 else made}


def linear_attention(b: int, t: int, n: int) -> dict[str, Any]:
    options = {"decay": -rand(b, t, 4, K), "value_decay": -rand(b, t, 4, V), "bonus": rand(4, K), "scale": 0.5}
    return matrix(b, t, n) | options | state(n, (4, K, V))


def delta_rule(b: int, t: int, n: int) -> dict[str, Any]:
    return matrix(b, t, n) | {"beta": rand(b, t, 4), "decay": -rand(b, t, 4), "scale": 0.5} | state(n, (4, K, V))


def dplr(b: int, t: int, n: int) -> dict[str, Any]:
    low_rank = {"a": randn(b, t, 2, K) / 4, "b": randn(b, t, 2, K) / 4}
    return matrix(b, t, n) | low_rank | {"decay": -rand(4, K), "scale": 0.5} | state(n, (4, K, V))


def mlstm(b: int, t: int, n: int) -> dict[str, Any]:
    gates = {"input_gate": randn(b, t, 4), "forget_gate": randn(b, t, 4), "scale": 0.5}
    return matrix(b, t, n) | gates | state(n, (4, K, V), (4, K), (4,))


def slstm(b: int, t: int, n: int) -> dict[str, Any]:
    gates = {name: randn(b, t, 2, K) for name in ("cell_input", "input_gate", "forget_gate", "output_gate")}
    return gates | {"recurrent": randn(4, 2, K, K)} | state(n, *[(2, K)] * 4)


def scan(b: int, t: int, n: int) -> dict[str, Any]:
    return {"x": randn(b, t, D), "decay": -rand(b, t, D)} | state(n, (D,))


def selective_scan(b: int, t: int, n: int) -> dict[str, Any]:
    inputs = {"x": randn(b, t, D), "dt": rand(b, t, D), "A": -rand(D, 3), "D": randn(D), "transition": "mamba"}
    return inputs | {"B": randn(b, t, 2, 3), "C": randn(b, t, 3)} | state(n, (D, 3))


def weighted_average(b: int, t: int, n: int) -> dict[str, Any]:
    inputs = {"k": randn(b, t, D), "v": randn(b, t, D), "decay": -rand(b, t, D), "bonus": randn(D)}
    return inputs | state(n, (D,), (D,), (D,))


def short_conv(b: int, t: int, n: int) -> dict[str, Any]:
    return {"x": randn(b, t, D), "weight": randn(D, 3), "bias": randn(D), "activation": "silu"} | state(n, (D, 3))


def test_time_training(b: int, t: int, n: int) -> dict[str, Any]:
    weights = {"W1": randn(4, K, K), "b1": randn(4, K)}
    gates = {name: -rand(b, t, 4) for name in ("momentum", "decay")} | {"lr": rand(b, t, 4) / 4}
    norm = {"norm_weight": rand(4, K), "norm_bias": rand(4, K), "position_scale": rand(2), "mini_batch": 2}
    make = importlib.import_module("zoo.kernels.test_time_training").test_time_training_state
    begin = make(weights, n, momentum=True, decay=True)
    return matrix(b, t, n, K) | gates | {"weights": weights, "inner": "linear"} | norm | {"initial_state": begin}


test_time_training.__test__ = False  # type: ignore[attr-defined]


def attention(b: int, t: int, n: int) -> dict[str, Any]:
    return {
        "q": randn(b, t, 4, K),
        "k": randn(b, t, 2, K),
        "v": randn(b, t, 2, V),
        "sink_logits": randn(4),
        "scale": 0.5,
    }


MAKE: dict[str, Callable[[int, int, int], dict[str, Any]]] = {
    made.__name__: made
    for made in (
        *(linear_attention, delta_rule, dplr, mlstm, slstm, scan, selective_scan, weighted_average, short_conv),
        *(test_time_training, attention),
    )
}
RECURRENT = [op for op in MAKE if op != "attention"]
CALLS = [*MAKE, *(f"{op}_step" for op in RECURRENT)]
# Arguments that give others their sizes: those are named in their place.
LEADING = {"q", "k", "v", "x", "cell_input", "weight", "A", "B", "weights"}
# Arguments with more than one legal form, which a change may turn into another.
FREE = {("selective_scan", "B"), ("selective_scan", "C"), ("slstm", "recurrent"), ("attention", "q")}
FREE |= {("short_conv", "x"), ("short_conv", "weight"), ("short_conv", "bias"), ("attention", "v")}
OPTIONS: dict[str, list[Any]] = {
    "scale": ["large", math.nan, math.inf, True],
    "transition": ["s6", None],
    "activation": ["gelu"],
    "inner": ["cubic", None],
    "mini_batch": [0, -1, 1.5, True, None],
}


def good(call: str, b: int = 2, t: int = 5) -> tuple[Any, Callable[..., Any], dict[str, Any]]:
    """The package, the function and arguments that it takes."""
    op = call.removesuffix("_step")
    package = importlib.import_module(f"zoo.kernels.{op}")
    if call == op:
        return package, getattr(package, op), MAKE[op](b, t, b)
    arguments = MAKE[op](b, 1, b)
    arguments["state"] = arguments.pop("initial_state")
    return package, getattr(package, call), arguments


def leaves(arguments: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Paths to the tensors: (name,) or (name, key)."""
    found: list[tuple[Any, ...]] = []
    for name, x in arguments.items():
        keys = range(len(x)) if isinstance(x, tuple) else x if isinstance(x, dict) else ()
        found += [(name,)] if isinstance(x, Tensor) else [(name, key) for key in keys]
    return found


def replaced(arguments: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any], Any]) -> dict[str, Any]:
    name, old = path[0], arguments[path[0]]
    if len(path) == 1:
        return arguments | {name: change(old)}
    if isinstance(old, dict):
        return arguments | {name: old | {path[1]: change(old[path[1]])}}
    return arguments | {name: tuple(change(x) if i == path[1] else x for i, x in enumerate(old))}


def changes(axis: int) -> dict[str, Callable[[Tensor], Any]]:
    return {
        "text": lambda x: "text",
        "number": lambda x: 1.0,
        "list": lambda x: [x],
        "integers": lambda x: x.to(torch.int64),
        "truths": lambda x: x > 0,
        "fp64": lambda x: x.double(),
        "complex": lambda x: x.to(torch.complex64),
        "meta": lambda x: x.to("meta"),
        "one axis more": lambda x: x.unsqueeze(axis % (x.dim() + 1)),
        "no axis": lambda x: x.sum(),
        "twice as long": lambda x: torch.cat([x, x], axis % x.dim()),
        "one shorter": lambda x: x.narrow(axis % x.dim(), 0, x.shape[axis % x.dim()] - 1),
        "empty": lambda x: x.narrow(axis % x.dim(), 0, 0),
    }


def boom(*args: Any) -> Any:
    raise AssertionError("it ran")


def refused(package: Any, run: Callable[..., Any], arguments: dict[str, Any]) -> str | None:
    """What a call is refused with; None if it would have run."""
    stuck = {name: dispatch.Backend(name, lambda *args: None, boom) for name in package.BACKENDS}
    with mock.patch.dict(package.BACKENDS, stuck), mock.patch.object(package, "_STEP", boom, create=True):
        try:
            run(**arguments)
        except ValueError as error:
            return str(error)
        except AssertionError as error:
            assert str(error) == "it ran"
    return None


def assert_named(message: str | None, arguments: dict[str, Any], name: str | None = None) -> None:
    assert message and "\n" not in message
    words = re.findall(r"\w+", re.split(r" (?:has|is|are|runs|must)\b", message)[0])
    assert name in words if name else set(words) & set(arguments), message


@pytest.mark.parametrize("call", CALLS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_bad_tensor_is_named_before_any_work(call, data):
    package, run, arguments = good(call)
    assert refused(package, run, arguments) is None
    path = data.draw(st.sampled_from(leaves(arguments)))
    how, change = data.draw(st.sampled_from(sorted(changes(data.draw(st.integers(0, 3))).items(), key=lambda x: x[0])))
    bad = replaced(arguments, path, change)
    message = refused(package, run, bad)
    if message is None:
        assert (call.removesuffix("_step"), path[0]) in FREE, f"{path} {how}"
        return
    assert_named(message, arguments, None if path[0] in LEADING else path[0])


@pytest.mark.parametrize("call", CALLS)
def test_a_bad_option_is_named(call):
    package, run, arguments = good(call)
    for name, values in OPTIONS.items():
        for value in values if name in arguments else ():
            assert_named(refused(package, run, arguments | {name: value}), arguments, name)


@pytest.mark.parametrize("call", [call for call in CALLS if call.endswith("_step")])
def test_a_step_needs_its_state_and_one_token(call):
    package, run, arguments = good(call)
    assert_named(refused(package, run, arguments | {"state": None}), arguments, "state")
    tokens = MAKE[call.removesuffix("_step")](2, 3, 2)
    tokens["state"] = tokens.pop("initial_state")
    message = refused(package, run, tokens)
    assert message and "exactly one token" in message


@pytest.mark.parametrize("op", MAKE)
@settings(max_examples=25, deadline=None)
@given(ends=st.lists(st.integers(-1, 6), min_size=1, max_size=5), whole=st.booleans())
def test_boundaries_of_packed_sequences(op, ends, whole):
    ends = [0, *sorted(abs(end) for end in ends if end <= 5), 5] if whole else ends
    package, run, _ = good(op)
    arguments = MAKE[op](1, 5, max(len(ends) - 1, 1)) | {"cu_seqlens": torch.tensor(ends, dtype=torch.int32)}
    message = refused(package, run, arguments)
    if len(ends) > 1 and ends[0] == 0 and ends[-1] == 5 and ends == sorted(ends):
        assert message is None
    else:
        assert_named(message, arguments, "cu_seqlens")


@pytest.mark.parametrize("op", MAKE)
def test_bad_boundaries_are_named(op):
    package, run, arguments = good(op, b=1)
    fine = torch.tensor([0, 5], dtype=torch.int32)
    assert refused(package, run, arguments | {"cu_seqlens": fine}) is None
    for bad in (fine.long(), fine.float(), fine[None], fine[:1], fine.to("meta"), [0, 5], 5):
        assert_named(
            refused(package, run, arguments | {"cu_seqlens": bad}), arguments | {"cu_seqlens": bad}, "cu_seqlens"
        )
    _, _, arguments = good(op, b=2)
    assert_named(refused(package, run, arguments | {"cu_seqlens": fine}), {"cu_seqlens": fine}, "cu_seqlens")


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, arguments)


class Call(torch.nn.Module):
    def __init__(self, run: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.run, self.options = run, options

    def forward(self, arguments: dict[str, Any]) -> Any:
        return self.run(**arguments, **self.options)


# torch's own tracer instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["compile", "export"])
def test_one_graph(call, how):
    _, run, arguments = good(call)
    options = {name: arguments.pop(name) for name in list(arguments) if isinstance(arguments[name], (str, int, float))}
    if call in RECURRENT:
        options["output_final_state"] = True
    module, twin = Call(run, options), copied(arguments)
    expected = (module(twin), twin.get("state"))
    if how == "compile":
        torch.compiler.reset()
        graph: Callable[..., Any] = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    else:
        graph = torch.export.export(module, (copied(arguments),), strict=False).module()
    torch.testing.assert_close((graph(arguments), arguments.get("state")), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", RECURRENT)
def test_a_step_is_a_well_formed_operator(op):
    package, run, arguments = good(f"{op}_step")
    seen: list[tuple[Any, ...]] = []
    with mock.patch.object(package, "_STEP", lambda *args: seen.append(args)):
        run(**arguments)
    torch.library.opcheck(getattr(torch.ops.zoo, f"{op}_step").default, seen[0])


@pytest.mark.parametrize("op", RECURRENT)
def test_a_step_writes_the_state_of_the_op(op):
    package, run, arguments = good(f"{op}_step")
    begin = copied(arguments.pop("state"))
    expected, final = getattr(package, op)(
        **arguments, initial_state=begin, output_final_state=True, backend="reference"
    )
    state = copied(begin)
    tensors = torch.utils._pytree.tree_leaves(arguments)
    leaf = next(x for x in tensors if isinstance(x, Tensor)).requires_grad_()
    o = run(**arguments, state=state)
    assert not o.requires_grad and leaf.grad is None
    torch.testing.assert_close((o, state), (expected.detach(), torch.utils._pytree.tree_map(Tensor.detach, final)))
