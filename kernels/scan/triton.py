"""The elementwise recurrence in a Triton kernel (B batch, T tokens, N sequences, D channels)."""

import importlib
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, vector

supports = vector.supports


def run(*args: Any) -> tuple[Tensor, Tensor]:
    x, decay, initial_state, _, cu_seqlens = args
    return OP(x, decay, initial_state, False, cu_seqlens)


def _start(x: Tensor, decay: Tensor, begin: Any, cu_seqlens: Any, *tensors: Any, **flags: int) -> tuple[Tensor, Tensor]:
    """y like x, and the state at the other end."""
    kernels = importlib.import_module("zoo.kernels.scan.triton_kernels")
    cut = vector.cut("scan.scan", x, cu_seqlens)
    y, end = torch.empty_like(x), x.new_empty(cut.sequences, x.shape[2], dtype=torch.float32)
    flags |= {"BEGIN": begin is not None, "REVERSE": int(bool(tensors))}
    vector.start(kernels.scan, cut, cu_seqlens, 2, x, decay, y, begin, end, *(tensors or (None,) * 3), **flags)
    return y, end


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, maximum, cu_seqlens = args
    return _start(*vector.contiguous(*tensors), cu_seqlens, MAX=maximum, INITIAL=False)


def _backward(given: dict[str, Any], results: list[Tensor], grads: list[Tensor | None]) -> dict[str, Any]:
    decay, initial, dh, dend = vector.contiguous(given["decay"], given["initial_state"], *grads)
    dh, ddecay = torch.zeros_like(results[0]) if dh is None else dh, torch.empty_like(decay)
    tensors = (results[0], initial, ddecay)
    dx, dinitial = _start(dh, decay, dend, given["cu_seqlens"], *tensors, MAX=False, INITIAL=initial is not None)
    return {"x": dx, "decay": ddecay, "initial_state": dinitial}


# With `maximum` (no gradient) h_t = max(h_{t-1} + decay_t, x_t).
ARGUMENTS = "Tensor x, Tensor decay, Tensor? initial_state, bool maximum, Tensor? cu_seqlens"
OP = custom.differentiable("scan", ARGUMENTS, 2, _forward, _backward, forgets=("x",))
