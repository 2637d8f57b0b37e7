"""Launches of the delta rule's Triton kernels. Imported on the first call, so that importing the op stays cheap.

Shapes: as in triton_forward.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.kernels import launch


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass; empty tensors where there is nothing."""

    z: Tensor
    y: Tensor
    entering: Tensor
    sums: Tensor
    q_norms: Tensor
    k_norms: Tensor


def chunk_size(dtype: torch.dtype, width: int) -> int:
    """64 tokens, or 32 where operands of 4 bytes or wide keys would not leave room for the tiles."""
    return 64 if dtype == torch.bfloat16 and launch.power(width) <= 128 else 32


@dataclass(frozen=True)
class Call:
    """The arguments that all kernels of one call share."""

    q: Tensor
    k: Tensor
    beta: Tensor
    value_width: int
    decay_form: int  # 0 none, 1 per head, 2 per token
    qk_l2norm: bool
    scale: float
    cu_seqlens: Tensor | None

    @cached_property
    def chunk(self) -> int:
        return chunk_size(self.q.dtype, self.q.shape[3])

    @cached_property
    def plan(self) -> launch.Plan:
        return launch.plan(self.q.shape[0], self.q.shape[1], self.chunk, self.cu_seqlens)

    @cached_property
    def dtype(self) -> torch.dtype:
        return launch.operand_dtype(self.q.dtype)

    @property
    def tokens(self) -> tuple[int, int, int]:
        return self.q.shape[0], self.q.shape[1], self.beta.shape[2]

    @property
    def states(self) -> tuple[int, ...]:
        return self.plan.sequences, self.beta.shape[2], self.q.shape[3], self.value_width

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def run(self, kernel: Any, *tensors: Tensor | None, per: str, **options: Any) -> None:
        """Launch `kernel` with one program per chunk or sequence, value head and (where it tiles V) tile."""
        name, width = kernel.fn.__name__, self.q.shape[3]
        chosen = launch.choice(f"delta_rule.{name}", width, self.q)
        tile = chosen.get("BV", 0)
        plan, heads = self.plan, self.beta.shape[2]
        tiled = name != "gradients" and tile > 0
        tile = min(tile, launch.power(self.value_width))
        tiles = -(-self.value_width // tile) if tiled else 1
        programs = (plan.count if per == "chunk" else plan.sequences) * heads * tiles
        layout = (plan.starts, plan.sizes) if per == "chunk" else (self.cu_seqlens, plan.first)
        sizes = {"length": self.q.shape[1], "chunks": plan.per_sequence}
        sizes |= {"H": self.q.shape[2], "HV": heads, "K": width, "C": self.chunk, "BK": launch.power(width)}
        sizes |= {"tiles": tiles} if tiled else {}
        sizes |= {"V": self.value_width, "BV": tile} if tile else {}
        flags = {"PACKED": self.cu_seqlens is not None, "DECAY": self.decay_form, "NORM": self.qk_l2norm}
        options |= chosen | sizes | flags | self._operands()
        launch.start(kernel, (programs,), *tensors, *layout, **options)

    def _operands(self) -> dict[str, Any]:
        language = importlib.import_module("triton.language")
        kind = language.bfloat16 if self.dtype == torch.bfloat16 else language.float32
        return {"DT": kind, "PRECISION": launch.precision(self.q.dtype)}


def forward(call: Call, v: Tensor, decay: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Saved]:
    """o, the final state and what the backward pass needs."""
    kernels = importlib.import_module("zoo.kernels.delta_rule.triton_forward")
    q, k, beta = call.q, call.k, call.beta
    saved = Saved(*(call.empty(*shape, dtype=kind) for shape, kind in saved_shapes(call)))
    o, final = torch.empty_like(v), call.empty(*call.states, dtype=torch.float32)
    z, y, entering, sums, *norms = saved
    call.run(kernels.prepare, q, k, beta, decay, z, sums, *norms, per="chunk")
    tensors = (k, v, beta, z, sums, norms[1], y, entering, initial_state, final)
    call.run(kernels.scan, *tensors, per="sequence", INITIAL=initial_state is not None)
    call.run(kernels.output, q, k, beta, sums, *norms, y, entering, o, per="chunk", scale=call.scale)
    return o, final, saved


def saved_shapes(call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
    b, t, hv = call.tokens
    count = launch.chunk_count(b, t, call.chunk, call.cu_seqlens)
    return [
        ((b, t, hv, call.chunk), call.dtype),
        ((b, t, hv, call.value_width), call.dtype),
        ((count, hv, call.q.shape[3], call.value_width), call.dtype),
        ((b, t, hv) if call.decay_form else (0,), torch.float64),
        *([((b, t, hv) if call.qk_l2norm else (0,), torch.float32)] * 2),
    ]


def backward(
    call: Call, saved: Saved, do: Tensor, dfinal: Tensor | None, restarts: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k (per value head), v, beta, the log decay of every token and the initial state; the last two
    are empty where there is none."""
    kernels = importlib.import_module("zoo.kernels.delta_rule.triton_backward")
    q, k, beta = call.q, call.k, call.beta
    z, y, entering, sums, *norms = saved
    dr, leaving, dv = torch.empty_like(y), torch.empty_like(entering), torch.empty_like(do)
    dbeta = torch.empty_like(beta)
    ddecay = torch.empty_like(beta) if call.decay_form else beta.new_empty(0)
    dinitial = call.empty(*(call.states if restarts else (0,)), dtype=torch.float32)
    tensors: tuple[Tensor | None, ...] = (q, k, beta, z, sums, *norms, do, dr, leaving, dfinal, dinitial)
    flags = {"INITIAL": restarts, "FINAL": dfinal is not None}
    call.run(kernels.scan_backward, *tensors, per="sequence", scale=call.scale, **flags)
    # Value heads of a group write apart and are summed after: no atomics.
    wide = q.dtype if beta.shape[2] == q.shape[2] else torch.float32
    dq, dk = (call.empty(*call.tokens, q.shape[3], dtype=wide) for _ in range(2))
    tensors = (q, k, beta, sums, *norms, y, entering, leaving, do, dr, dq, dk, dv, dbeta, ddecay)
    call.run(kernels.gradients, *tensors, per="chunk", scale=call.scale)
    return dq, dk, dv, dbeta, ddecay, dinitial
