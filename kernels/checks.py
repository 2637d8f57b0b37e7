"""Validation shared by the ops: every message names the argument, what it was and what it must be.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Parts = Mapping[str, tuple[Sequence[int], str]]  # of a state that is a tuple: name -> shape, axes

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


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is {type(x).__name__}; it must be a tensor")


def check_float(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64")


def check_dims(name: str, x: Tensor, dims: str) -> None:
    """`dims` spells the expected axes, for example "B T H K"."""
    check_tensor(name, x)
    if x.dim() != len(dims.split()):
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be [{dims.replace(' ', ', ')}]")


def check_shape(name: str, x: Tensor, shape: Sequence[int], dims: str) -> None:
    check_dims(name, x, dims)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be [{dims.replace(' ', ', ')}] = {list(shape)}")


def check_like(name: str, x: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    """`x` must lie where `other` does and have `dtype`."""
    if x.dtype != dtype:
        raise ValueError(f"{name} has dtype {x.dtype}; beside inputs of {other.dtype} it must be {dtype}")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {other.device} like the first input")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k [B, T, H, K] and v [B, T, Hv, V], of one dtype and device, with Hv a multiple of H."""
    check_float("q", q)
    check_dims("q", q, "B T H K")
    check_shape("k", k, q.shape, "B T H K")
    check_dims("v", v, "B T Hv V")
    check_shape("v", v, (*q.shape[:2], *v.shape[2:]), "B T Hv V")
    check_like("k", k, q, q.dtype)
    check_like("v", v, q, q.dtype)
    if q.shape[2] < 1 or v.shape[2] % q.shape[2] or v.shape[2] < 1:
        raise ValueError(f"v has {v.shape[2]} heads; it must be a positive multiple of the {q.shape[2]} heads of q")
    if q.shape[0] < 1 or q.shape[3] < 1 or v.shape[3] < 1:
        raise ValueError(f"q {list(q.shape)} and v {list(v.shape)} must have B, K and V of at least 1")


def check_decay(decay: Tensor | None, q: Tensor, v: Tensor) -> None:
    """None | [Hv] | [Hv, K] | [B, T, Hv] | [B, T, Hv, K]."""
    if decay is None:
        return
    check_tensor("decay", decay)
    b, t, hv, width = *v.shape[:3], q.shape[3]
    shapes = {1: (hv,), 2: (hv, width), 3: (b, t, hv), 4: (b, t, hv, width)}
    if tuple(decay.shape) != shapes.get(decay.dim()):
        raise ValueError(
            f"decay has shape {list(decay.shape)}; it must be None or one of [Hv] = {list(shapes[1])}, "
            f"[Hv, K] = {list(shapes[2])}, [B, T, Hv] = {list(shapes[3])}, [B, T, Hv, K] = {list(shapes[4])}"
        )
    check_like("decay", decay, q, state_dtype(q.dtype))


def check_gate(name: str, x: Tensor | None, q: Tensor, shape: Sequence[int], dims: str) -> None:
    """An optional fp32 (fp64) tensor of one shape: beta, value_decay, initial_state, ..."""
    if x is None:
        return
    check_shape(name, x, shape, dims)
    check_like(name, x, q, state_dtype(q.dtype))


def check_scale(scale: float | None) -> None:
    if scale is not None and not isinstance(scale, (int, float)):
        raise ValueError(f"scale is {type(scale).__name__}; it must be a number or None")


def check_length(length: int, cu_seqlens: Tensor | None, name: str = "q") -> None:
    if length < 1 and cu_seqlens is None:
        raise ValueError(f"{name} has T = 0; it must hold at least one token (only packed sequences may be empty)")


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
        raise ValueError(f"the batch is {x.shape[0]}; with cu_seqlens it must be 1, the sequences packed along T")
    if values_readable(cu_seqlens):
        _check_boundaries(host_values(cu_seqlens), x.shape[1])


def _check_boundaries(values: list[int], length: int) -> None:
    if values[0] != 0 or values[-1] != length:
        raise ValueError(f"cu_seqlens runs from {values[0]} to {values[-1]}; it must run from 0 to T = {length}")
    if any(b < a for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"cu_seqlens is {values}; it must never decrease")


def values_readable(x: Tensor) -> bool:
    """Whether reading x on the host is allowed: not while compiling, capturing a graph or running without data."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def host_values(x: Tensor) -> list[int]:
    """x.tolist(), read from the device once as long as x lives and is not written."""
    version = None if x.is_inference() else x._version
    cached = _host_values.get(x)
    if cached is None or cached[0] != version or version is None:
        cached = (version, x.tolist())
        _host_values[x] = cached
    values: list[int] = cached[1]
    return values


def check_bonus(bonus: Tensor | None, q: Tensor, v: Tensor) -> None:
    """None | [Hv] | [Hv, K]."""
    if bonus is None:
        return
    check_tensor("bonus", bonus)
    shape = (v.shape[2], q.shape[3])
    if tuple(bonus.shape) not in (shape[:1], shape):
        raise ValueError(f"bonus has shape {list(bonus.shape)}; it must be [Hv] or [Hv, K] = {list(shape)}")
    check_like("bonus", bonus, q, state_dtype(q.dtype))


def check_state(state: Tensor | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, columns: int) -> None:
    """None | [N, Hv, K, columns] in the state dtype."""
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_gate("initial_state", state, q, (n, v.shape[2], q.shape[3], columns), "N Hv K V")


def check_one_token(q: Tensor, name: str = "q") -> None:
    if q.shape[1] != 1:
        raise ValueError(f"{name} has T = {q.shape[1]}; a step takes exactly one token")


def check_step_state(state: Tensor, q: Tensor, v: Tensor, columns: int) -> None:
    check_tensor("state", state)
    check_gate("state", state, q, (q.shape[0], v.shape[2], q.shape[3], columns), "B Hv K V")


def check_tokens(name: str, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Floats [B, T, D] with B and D of at least 1, and T too unless sequences are packed along it."""
    check_float(name, x)
    check_dims(name, x, "B T D")
    if x.shape[0] < 1 or x.shape[2] < 1:
        raise ValueError(f"{name} has shape {list(x.shape)}; B and D must be at least 1")
    check_length(x.shape[1], cu_seqlens, name)
    check_cu_seqlens(cu_seqlens, x)


def count_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """N: the batch, or the packed sequences."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_states(name: str, states: object, x: Tensor, parts: Parts, optional: bool = True) -> None:
    """A tuple with one tensor in the state dtype for each of `parts`, in their order; or None, where `optional`."""
    if states is None and optional:
        return
    if not isinstance(states, (tuple, list)) or len(states) != len(parts):
        found = f"{len(states)} items" if isinstance(states, (tuple, list)) else type(states).__name__
        raise ValueError(f"{name} is {found}; it must be a tuple of the {len(parts)} tensors ({', '.join(parts)})")
    for state, (part, (shape, dims)) in zip(states, parts.items(), strict=True):
        check_shape(f"{part} of {name}", state, shape, dims)
        check_like(f"{part} of {name}", state, x, state_dtype(x.dtype))
