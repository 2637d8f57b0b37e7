"""What every op and its step promise: bad arguments are named before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from calls import CALLS, MAKE, good
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.kernels import dispatch

# Arguments that give others their sizes: those are named in their place.
LEADING = {"q", "k", "v", "x", "cell_input", "weight", "A", "B", "weights", "blocks"}
# Arguments with more than one legal form, which a change may turn into another.
FREE = {("selective_scan", "B"), ("selective_scan", "C"), ("slstm", "recurrent"), ("attention", "q")}
FREE |= {("short_conv", "x"), ("short_conv", "weight"), ("short_conv", "bias"), ("attention", "v")}
FREE |= {("block_sparse_attention", name) for name in ("q", "v", "blocks", "counts", "columns")}
OPTIONS: dict[str, list[Any]] = {
    "scale": ["large", math.nan, math.inf, True],
    "transition": ["s6", None],
    "activation": ["gelu"],
    "inner": ["cubic", None],
    "mini_batch": [0, -1, 1.5, True, None],
    "query_block": [0, 2, 15, 129, 16.0, True, None],
    "block": [0, 2, 15, 129, 16.0, True, None],
    "window": [-1, 1.5, True, None],
}


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
