"""Calls of the elementwise ops with the tensors of their states as arguments and results of their own.

Shapes: B batch, T tokens, N sequences, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from zoo.kernels.scan import scan
from zoo.kernels.selective_scan import selective_scan
from zoo.kernels.short_conv import short_conv
from zoo.kernels.weighted_average import weighted_average

AVERAGES = ("numerator", "denominator", "maximum")  # the state of weighted_average


@dataclass(frozen=True)
class Case:
    """`inputs(t, b, n=..., d=...)` makes the tensors of a `call` in fp32."""

    call: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    halves: tuple[str, ...]  # tensors that may have half precision
    common: tuple[str, ...] = ()  # tensors that all sequences share
    state: tuple[str, ...] = ("initial_state",)


def scan_inputs(t, b=2, *, n=None, strength=1.0, d=3):
    return {
        "x": torch.randn(b, t, d),
        "decay": -strength * torch.rand(b, t, d) ** 2,
        "initial_state": torch.randn(n or b, d),
    }


def selective_scan_inputs(t, b=2, kind="mamba", *, n=None, strength=1.0, d=2, states=2):
    shape = {"groups": (b, t, 2, states), "s4d": (d, states)}.get(kind, (b, t, states))
    tensors = {
        "x": torch.randn(b, t, d),
        "dt": torch.rand(b, t, d) / (states if kind == "longhorn" else 1),
        "A": None if kind == "longhorn" else -strength * torch.rand(d, states),
        "B": torch.rand(shape),
        "C": torch.randn(shape),
        "D": torch.randn(d),
        "initial_state": torch.randn(n or b, d, states),
    }
    return {name: x for name, x in tensors.items() if x is not None}


def call_selective_scan(A=None, D=None, initial_state=None, **arguments):
    kind = "longhorn" if A is None else "mamba"
    return selective_scan(A=A, D=D, initial_state=initial_state, transition=kind, **arguments)


def short_conv_inputs(t, b=2, *, n=None, d=3, width=4):
    return {
        "x": torch.randn(b, t, d),
        "weight": torch.randn(d, width),
        "bias": torch.randn(d),
        "initial_state": torch.randn(n or b, d, width),
    }


def weighted_average_inputs(t, b=2, *, n=None, decay="token", bonus=True, strength=1.0, spread=1.0, d=2):
    shapes = {"none": None, "channel": (d,), "token": (b, t, d)}
    tensors = {
        "k": spread * torch.randn(b, t, d),
        "v": torch.randn(b, t, d),
        "decay": None if decay == "none" else -strength * torch.rand(shapes[decay]),
        "bonus": torch.randn(d) if bonus else None,
        "numerator": torch.randn(n or b, d),
        "denominator": torch.rand(n or b, d),
        "maximum": torch.randn(n or b, d),
    }
    return {name: x for name, x in tensors.items() if x is not None}


def call_weighted_average(numerator=None, denominator=None, maximum=None, **arguments):
    begin = None if numerator is None else (numerator, denominator, maximum)
    o, state = weighted_average(**arguments, initial_state=begin)
    return (o, *(state or ()))


CASES = {
    "scan": Case(scan, scan_inputs, ("x",)),
    "selective_scan": Case(call_selective_scan, selective_scan_inputs, ("x", "B", "C"), ("A", "D")),
    "short_conv": Case(short_conv, short_conv_inputs, ("x",), ("weight", "bias")),
    "weighted_average": Case(call_weighted_average, weighted_average_inputs, ("k", "v"), ("bonus",), AVERAGES),
}
