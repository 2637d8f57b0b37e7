"""Validation shared by the ops: every message names the argument, what it was and what it must be.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Parts = Mapping[str, tuple[Sequence[int], str]]  # of a state that is a tuple: name -> shape and axes after N
_host_values = WeakIdKeyDictionary()


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gates and states are fp32, or fp64 beside fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the autocast dtype of their device, where autocast is on (fp64 is left alone, as torch does).

    Runs before validation, so it passes on whatever is no float tensor.
    """
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch 2.11 cannot trace is_autocast_available
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    casts = (torch.float16, torch.bfloat16, torch.float32)
    return [x.to(dtype) if isinstance(x, Tensor) and x.dtype in casts else x for x in tensors]


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """Ops cast their inputs themselves; autocast knows no device "meta"."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is {type(x).__name__}; it must be a tensor")


def check_float(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64")


def check_shape(name: str, x: Tensor, shape: Sequence[int] | None, dims: str) -> None:
    """`dims` spells the expected axes, for example "B T H K", and `shape` their sizes, or None where any will do."""
    check_tensor(name, x)
    if x.dim() != len(dims.split()):
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be [{dims.replace(' ', ', ')}]")
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be [{dims.replace(' ', ', ')}] = {list(shape)}")


def check_like(name: str, x: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> None:
    """`x` must lie where `other` does and have `dtype`, or any float dtype."""
    if dtype is None:
        check_float(name, x)
    elif x.dtype != dtype:
        raise ValueError(f"{name} has dtype {x.dtype}; beside inputs of {other.dtype} it must be {dtype}")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {other.device} like the first input")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k [B, T, H, K] and v [B, T, Hv, V], of one dtype and device, with Hv a multiple of H."""
    check_float("q", q)
    check_shape("q", q, None, "B T H K")
    check_shape("k", k, q.shape, "B T H K")
    check_shape("v", v, None, "B T Hv V")
    check_shape("v", v, (*q.shape[:2], *v.shape[2:]), "B T Hv V")
    check_like("k", k, q, q.dtype)
    check_like("v", v, q, q.dtype)
    if q.shape[2] < 1 or v.shape[2] % q.shape[2] or v.shape[2] < 1:
        raise ValueError(f"v has {v.shape[2]} heads; it must be a positive multiple of the {q.shape[2]} heads of q")
    if q.shape[0] < 1 or q.shape[3] < 1 or v.shape[3] < 1:
        raise ValueError(f"q {list(q.shape)} and v {list(v.shape)} must have B, K and V of at least 1")


def check_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, Tq, H, K], k [B, Tk, Hk, K] and v [B, Tk, Hk, V], of one dtype and device, with H a multiple of Hk."""
    check_float("q", q)
    for name, x, dims in (("q", q, "B Tq H K"), ("k", k, "B Tk Hk K"), ("v", v, "B Tk Hk V")):
        check_shape(name, x, None, dims)
        check_like(name, x, q, q.dtype)
    check_shape("k", k, (q.shape[0], *k.shape[1:3], q.shape[3]), "B Tk Hk K")
    check_shape("v", v, (*k.shape[:3], v.shape[3]), "B Tk Hk V")
    if k.shape[2] < 1 or q.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads; it must be a positive multiple of the {k.shape[2]} heads of k")
    if q.shape[0] < 1 or q.shape[3] < 1 or v.shape[3] < 1:
        raise ValueError(f"q {list(q.shape)} and v {list(v.shape)} must have B, K and V of at least 1")


def check_gate(name: str, x: Any, q: Tensor, shape: Sequence[int], dims: str, *, required: bool = False) -> None:
    """An fp32 (fp64) tensor of one shape: beta, value_decay, initial_state, ..."""
    if x is not None or required:
        check_shape(name, x, shape, dims)
        check_like(name, x, q, state_dtype(q.dtype))


def check_form(name: str, x: Tensor | None, q: Tensor, shapes: Mapping[str, Sequence[int]]) -> None:
    """None, or an fp32 (fp64) tensor of one of several shapes, by their axes."""
    if x is not None:
        check_tensor(name, x)
        if list(x.shape) not in map(list, shapes.values()):
            allowed = ", ".join(f"[{dims.replace(' ', ', ')}] = {list(shape)}" for dims, shape in shapes.items())
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be None or one of {allowed}")
        check_like(name, x, q, state_dtype(q.dtype))


def default_scale(scale: float | None, q: Tensor) -> float:
    """The factor on q, once it is checked."""
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise ValueError(f"scale is {type(scale).__name__}; it must be a number or None")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")
    return float(scale)


def check_cu_seqlens(cu_seqlens: Tensor | None, x: Tensor) -> None:
    """int32 [N + 1] on x's device, x of B = 1; from 0 to T, never decreasing, read once per tensor in eager mode."""
    if cu_seqlens is None:
        return
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}; it must be torch.int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [N + 1] with N of at least 1")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; it must be on {x.device} like the first input")
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens is given beside a batch of {x.shape[0]}; with cu_seqlens it must be 1")
    if readable(x):
        values, length = host_values(cu_seqlens), x.shape[1]
        if values[0] != 0 or values[-1] != length:
            raise ValueError(f"cu_seqlens runs from {values[0]} to {values[-1]}; it must run from 0 to T = {length}")
        if values != sorted(values):
            raise ValueError(f"cu_seqlens is {values}; it must never decrease")


def readable(x: Tensor) -> bool:
    """Whether values may be read from x's device: not while a compiler or a CUDA graph records what is done."""
    unreadable = torch.compiler.is_compiling() or x.is_meta
    return not (unreadable or (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def host_values(x: Tensor) -> list[int]:
    """x.tolist(), read from the device once as long as x lives and is not written."""
    version = None if x.is_inference() else x._version
    if version is None or _host_values.get(x, (None,))[0] != version:
        _host_values[x] = version, x.tolist()
    found: list[int] = _host_values[x][1]
    return found


def check_tokens(name: str, x: Tensor, cu_seqlens: Tensor | None, step: bool, dims: str = "B T D") -> None:
    """Floats [B, T, ...] with no axis empty, unless packed sequences have no token."""
    check_float(name, x)
    check_shape(name, x, None, dims)
    if 0 in (*x.shape[:1], *x.shape[2:]):
        raise ValueError(f"{name} has shape {list(x.shape)}; only T may be 0, and only for packed sequences")
    check_sequences(name, x, cu_seqlens, step)


def check_sequences(name: str, x: Tensor, cu_seqlens: Tensor | None, step: bool) -> None:
    """One token for a step; else at least one, unless sequences are packed along T."""
    if step and x.shape[1] != 1:
        raise ValueError(f"{name} has T = {x.shape[1]}; a step takes exactly one token")
    if x.shape[1] < 1 and cu_seqlens is None:
        raise ValueError(f"{name} has T = 0; it must hold at least one token (only packed sequences may be empty)")
    check_cu_seqlens(cu_seqlens, x)


def count_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """N: the batch, or the packed sequences."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_state(
    state: Any, x: Tensor, shape: Sequence[int], dims: str, cu_seqlens: Tensor | None, step: bool, dtype: Any = None
) -> None:
    """[N, *shape] in the state dtype, or another; only a step cannot do without."""
    if step or state is not None:
        name = "state" if step else "initial_state"
        check_shape(name, state, (count_sequences(x, cu_seqlens), *shape), f"N {dims}")
        check_like(name, state, x, dtype or state_dtype(x.dtype))


def check_states(states: object, x: Tensor, parts: Parts, cu_seqlens: Tensor | None, step: bool) -> None:
    """A tuple with one tensor in the state dtype for each of `parts`, in their order; only a step needs it."""
    if states is None and not step:
        return
    name, n = "state" if step else "initial_state", count_sequences(x, cu_seqlens)
    if not isinstance(states, (tuple, list)) or len(states) != len(parts):
        found = f"{len(states)} items" if isinstance(states, (tuple, list)) else type(states).__name__
        raise ValueError(f"{name} is {found}; it must be a tuple of the {len(parts)} tensors ({', '.join(parts)})")
    for state, (part, (shape, dims)) in zip(states, parts.items(), strict=True):
        check_gate(f"{part} of {name}", state, x, (n, *shape), f"N {dims}", required=True)


def check_recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Any, state: Any, cu_seqlens: Any = None, *, columns: int = 0,
    step: bool = False,
) -> None:  # fmt: skip
    """What the ops with a state [N, Hv, K, V + columns] share."""
    check_qkv(q, k, v)
    b, t, hv, width = *v.shape[:3], q.shape[3]
    forms = {"Hv": (hv,), "Hv K": (hv, width), "B T Hv": (b, t, hv), "B T Hv K": (b, t, hv, width)}
    check_form("decay", decay, q, forms)
    check_sequences("q", q, cu_seqlens, step)
    check_state(state, q, (hv, width, v.shape[3] + columns), "Hv K V", cu_seqlens, step)
