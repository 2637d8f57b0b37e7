"""Decoding: ops that take one token and write the state in place.

Shapes: B batch, H key heads, Hv value heads, K and V head widths; tokens are [B, 1, ...], states [B, Hv, K, V].
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from zoo.kernels import checks, custom, launch
from zoo.kernels.packed import per_token, prepare


def op(name: str, arguments: str, run: Callable[..., Any], *, tree: bool = False) -> Callable[..., Tensor]:
    """The op zoo::`name`(`arguments`, state) for one token by `run` of a backend; a `tree` is a state of several."""
    return in_place(name, arguments, partial(by_run, run), tree=tree)


def by_run(run: Callable[..., Any], *args: Any) -> Tensor:
    """o, with the final state written over the last argument."""
    *given, state = args
    tree = isinstance(state, list)
    with checks.autocast_off(args[0]):
        o, after = run(*given, tuple(state) if tree else state, True, None)
        for old, new in zip(state, after, strict=True) if tree else [(state, after)]:
            old.copy_(new)
        return o.to(args[0].dtype)


def in_place(name: str, arguments: str, function: Callable[..., Any], *, tree: bool = False) -> Callable[..., Tensor]:
    """The op zoo::`name`(`arguments`, state) that overwrites its state, a tensor or a list of them."""
    schema = f"({arguments}, Tensor(a!){'[]' if tree else ''} state) -> Tensor"
    through = custom.register(name, schema, function, ["state"])

    @torch.no_grad()
    def step(*args: Any) -> Tensor:
        # Eager CPU calls have no use for the op, whose passage costs as much as a small step itself.
        x = args[0]
        plain = type(x) in (Tensor, Parameter) and x.device.type == "cpu" and not torch.compiler.is_compiling()
        found: Tensor = function(*args) if plain else through(*args)
        return found

    return step


def matrix(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, *, a: Tensor | None = None,
    b: Tensor | None = None, beta: Tensor | None = None, norm: bool = False, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """One token of linear_attention, of delta_rule (with beta) or of dplr (with a and b): o [B, 1, Hv, V] in q's dtype.

    On a GPU a kernel reads and writes the state once.
    """
    inner = state[0].is_contiguous() and state.dtype == torch.float32 and q.shape[3] <= 256
    if inner and launch.device_reason(state) is None and importlib.util.find_spec("triton") is not None:
        return _launch(state, q, k, v, a, b, beta, decay, norm, scale)
    with checks.autocast_off(q):
        return _plain(state, q, k, v, a, b, beta, decay, norm, scale).to(q.dtype)


def _plain(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    a, b, beta, decay, norm, scale = rest
    low_rank = [] if a is None else [a, b]
    q, k, v, *low_rank = (x.transpose(1, 2) for x in prepare(q, k, v, *low_rank, scale=scale, norm=norm))
    read = None if a is None else low_rank[0] @ state
    decay = per_token(decay, v.transpose(1, 2))
    if decay is not None:
        state.mul_(decay[:, 0].exp().unsqueeze(-1))
    if beta is not None:
        v = beta[:, 0, :, None, None] * (v - k @ state)
    if read is not None:
        state.addcmul_(low_rank[1].mT, read)
    state.addcmul_(k.mT, v)  # an outer product, in one pass over the state
    return (q @ state).transpose(1, 2)


def _launch(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    a, b, beta, decay, norm, scale = rest
    kernel = importlib.import_module("zoo.kernels.triton_step").step_kernel
    (batch, _, heads, width), values = q.shape, v.shape[2:]
    chosen = dict(launch.choice("steps.matrix", width, state))
    tile = min(chosen.pop("BV"), launch.power(values[1]))
    rows = [None if x is None else x if x[0].is_contiguous() else x.contiguous() for x in (q, k, v, a, b)]
    gates = [None if x is None else x.contiguous() for x in (beta, decay)]
    o = q.new_empty(batch, 1, *values)
    strides = [0 if x is None else x.stride(0) for x in (*rows, state)]
    form = 0 if decay is None else decay.dim()
    sizes = {"H": heads, "HV": values[0], "K": width, "V": values[1], "BK": launch.power(width), "BV": tile}
    flags = {"DECAY": form, "DELTA": beta is not None, "LOW_RANK": a is not None, "NORM": norm}
    grid = (batch * values[0] * -(-values[1] // tile),)
    launch.start(kernel, grid, *rows, *gates, state, o, scale, *strides, **sizes, **flags, **chosen)
    return o
