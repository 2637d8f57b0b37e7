"""One call that every op, and every step, takes.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths, D channels, n states.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

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


def block_sparse_attention(b: int, t: int, n: int) -> dict[str, Any]:
    lists = {"blocks": torch.randint(0, t, (b, 2, t, 3)), "counts": torch.randint(0, 4, (b, 2, t))}
    inputs = {"q": randn(b, t, 4, K), "k": randn(b, t, 2, K), "v": randn(b, t, 2, V), "bias": randn(b, 2, t, 3)}
    columns = torch.randint(0, t, (n, 2, 2))
    return inputs | lists | {"columns": columns, "query_block": 1, "block": 1, "window": 1, "scale": 0.5}


MAKE: dict[str, Callable[[int, int, int], dict[str, Any]]] = {
    made.__name__: made
    for made in (
        *(linear_attention, delta_rule, dplr, mlstm, slstm, scan, selective_scan, weighted_average, short_conv),
        *(test_time_training, attention, block_sparse_attention),
    )
}
RECURRENT = [op for op in MAKE if op not in ("attention", "block_sparse_attention")]
CALLS = [*MAKE, *(f"{op}_step" for op in RECURRENT)]


def good(call: str, b: int = 2, t: int = 5) -> tuple[Any, Callable[..., Any], dict[str, Any]]:
    """The package, the function and arguments that it takes."""
    op = call.removesuffix("_step")
    package = importlib.import_module(f"zoo.kernels.{op}")
    if call == op:
        return package, getattr(package, op), MAKE[op](b, t, b)
    arguments = MAKE[op](b, 1, b)
    arguments["state"] = arguments.pop("initial_state")
    return package, getattr(package, call), arguments
