"""The delta rule in Triton kernels: `prepare` and `scan` forward, `scan_backward` and `gradients` backward, with the
formulas in triton_kernels; with a decay per channel it runs through the kernels of `dplr`.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, launch
from zoo.kernels.dplr import triton as channel
from zoo.kernels.packed import sum_groups

supports = channel.supports


def run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, qk_l2norm: bool, scale: float,
    initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if decay is not None and decay.dim() in (2, 4):
        rest = (qk_l2norm, scale, initial_state, output_final_state, cu_seqlens)
        return channel.call(q, k, v, None, None, beta, decay, *rest)
    inputs = (q, k, v, beta, decay, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final, *_ = OP(q, k, v, beta, decay, qk_l2norm, scale, initial_state, cu_seqlens, keep)
    return o, final if output_final_state else None


def chunk_size(dtype: torch.dtype, width: int) -> int:
    """64 tokens, or fewer where operands of 4 bytes or wide keys would not leave room for the tiles."""
    wide = launch.power(width) > 128
    return (32 if wide else 64) if dtype == torch.bfloat16 else 16 if wide else 32


LAUNCH = ("num_warps", "num_stages", "maxnreg")


def segment_size(length: int, heads: int, width: int) -> int:
    """Tokens that one program walks through: long sequences are cut so that a batch of one fills a GPU."""
    count = max(1, min(256 // (heads * -(-width // 64)), length // 1024)) if length > 2048 else 1
    return max(1, -(-length // (64 * count))) * 64


@dataclass(frozen=True)
class Call:
    """The arguments that all kernels of one call share."""

    q: Tensor
    k: Tensor
    beta: Tensor
    decay: Tensor | None
    value_width: int
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
    def segment(self) -> int:
        return segment_size(self.q.shape[1], self.beta.shape[2], self.value_width)

    @property
    def split(self) -> bool:
        return self.q.shape[1] > self.segment

    def borders(self, rows: int) -> Tensor:
        """Room for so many rows of K at every place where a segment may end and another begin."""
        count = self.q.shape[0] * self.q.shape[1] // self.segment
        return self.empty(count, self.beta.shape[2], rows, self.q.shape[3], dtype=torch.float32, when=self.split)

    @property
    def states(self) -> tuple[int, ...]:
        return self.plan.sequences, self.beta.shape[2], self.q.shape[3], self.value_width

    def empty(self, *shape: int, dtype: torch.dtype | None = None, when: bool = True) -> Tensor:
        """Of a shape, or of none; in the dtype of the products' operands unless told."""
        dtype = dtype or launch.operand_dtype(self.q.dtype)
        return torch.empty(shape if when else (0,), dtype=dtype, device=self.q.device)

    def run(self, name: str, *tensors: Tensor | None, scans: bool, **options: Any) -> None:
        """Launch a kernel with one program per chunk and value head, or (scans) per sequence, segment, head, tile."""
        kernels = importlib.import_module("zoo.kernels.delta_rule.triton_kernels")
        function, width, plan, heads = getattr(kernels, name), self.q.shape[3], self.plan, self.beta.shape[2]
        lean = options.get("LEAN", False)
        options |= launch.choice(f"delta_rule.{name}" + "_lean" * lean, width, self.q)
        options |= {"length": self.q.shape[1], "chunks": plan.per_sequence, "PACKED": self.cu_seqlens is not None}
        options |= {"H": self.q.shape[2], "HV": heads, "K": width, "C": self.chunk, "BK": launch.power(width)}
        dtype = str(launch.operand_dtype(self.q.dtype)).removeprefix("torch.")
        options |= {"DT": getattr(kernels.tl, dtype), "PRECISION": launch.precision(self.q.dtype), "scale": self.scale}
        form = 0 if self.decay is None else 1 if self.decay.dim() == 1 else 2
        options["DECAY"] = form > 0 if scans else form
        if "BV" in options:
            most, tile = options["BV"], min(options["BV"], launch.power(self.value_width))
            options |= {"V": self.value_width, "BV": tile}
        if scans:
            options["num_warps"] = max(4, options["num_warps"] * tile // most)
            segments = 1 if name == "carry" else max(1, -(-self.q.shape[1] // self.segment))
            count = -(-self.value_width // options["BV"])
            count += -(-width // options["BV"]) if name == "scan" and lean else 0
            options |= {"segment": self.segment, "segments": segments, "tile_count": count}
            programs, layout = plan.sequences * segments * heads * count, (self.cu_seqlens, plan.first)
        else:
            programs, layout = plan.count * heads, (plan.starts, plan.sizes)
        options = {name: x for name, x in options.items() if name in function.arg_names or name in LAUNCH}
        launch.start(function, (programs,), *tensors, *layout, **options)

    def scan(self, name: str, states: Tensor, transitions: Tensor, *tensors: Tensor | None, **options: Any) -> None:
        """Launch a scan, with the states at the ends of segments found first."""
        if self.split:
            self.run(name, states, *tensors, scans=True, LEAN=True, **options)
            self.run("carry", states, transitions, scans=True, REVERSE=name == "scan_backward")
        self.run(name, states if self.split else None, *tensors, scans=True, LEAN=False, **options)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, qk_l2norm: bool, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """o, the final state and, where `keep`, what the backward pass needs."""
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    decay, initial_state = (None if x is None else x.contiguous() for x in (decay, initial_state))
    call = Call(q, k, beta, decay, v.shape[3], qk_l2norm, scale, cu_seqlens)
    chunks, hv, chunk = call.plan.count, beta.shape[2], call.chunk
    e, at = call.empty(*beta.shape, q.shape[3]), call.empty(*beta.shape, chunk)
    zt, y = call.empty(*at.shape, when=keep), call.empty(*v.shape, when=keep)
    entering = call.empty(chunks, hv, v.shape[3], q.shape[3], when=keep)
    factors = call.empty(chunks, hv, 4, chunk, 2, dtype=torch.float32)
    # Differences of sums in fp64 keep fp32 accuracy.
    wide = torch.float32 if q.dtype == torch.bfloat16 else torch.float64
    sums = call.empty(chunks, hv, chunk, dtype=wide, when=keep and decay is not None)
    o, final = torch.empty_like(v), call.empty(*call.states, dtype=torch.float32)
    tensors: tuple[Tensor | None, ...] = (q, k, beta, decay, e, at, zt, factors, sums)
    call.run("prepare", *tensors, scans=False, NORM=qk_l2norm, KEEP=keep)
    crossing = call.borders(v.shape[3] + q.shape[3])
    tensors = (q, k, v, e, at, zt, factors, y, entering, initial_state, final, o)
    call.scan("scan", crossing, crossing, *tensors, INITIAL=initial_state is not None, KEEP=keep)
    saved = (e, at, y, entering, factors, sums, crossing)
    return (o, final, *(saved if keep else [None] * len(saved)))


def _backward(given: dict[str, Any], results: list[Tensor], grads: list[Tensor | None]) -> dict[str, Any]:
    q, k, beta = (given[name].contiguous() for name in ("q", "k", "beta"))
    decay, restarts = given["decay"], given["initial_state"] is not None
    o, _, e, at, y, entering, factors, sums, crossing = results
    do, dfinal = (None if x is None else x.contiguous() for x in grads[:2])
    do = torch.zeros_like(o) if do is None else do
    call = Call(q, k, beta, decay, o.shape[3], given["qk_l2norm"], given["scale"], given["cu_seqlens"])
    leaving, dv, dbeta = torch.empty_like(entering), torch.empty_like(do), torch.empty_like(beta)
    ddecay = call.empty(*beta.shape, dtype=beta.dtype, when=decay is not None)
    dinitial = call.empty(*call.states, dtype=torch.float32, when=restarts)
    tensors: tuple[Tensor | None, ...] = (q, k, e, at, factors, do, dv, leaving, dfinal, dinitial)
    options = {"INITIAL": restarts, "FINAL": dfinal is not None}
    call.scan("scan_backward", call.borders(o.shape[3]), crossing, *tensors, **options)
    # Value heads of a group write apart and are summed after: no atomics.
    wide = q.dtype if beta.shape[2] == q.shape[2] else torch.float32
    dq, dk = (call.empty(*beta.shape, q.shape[3], dtype=wide) for _ in range(2))
    tensors = (q, k, factors, sums, y, entering, leaving, do, dq, dk, dv, dbeta, ddecay)
    call.run("gradients", *tensors, scans=False, NORM=call.qk_l2norm)
    dq, dk = (sum_groups(x, q) for x in (dq, dk))
    ddecay = ddecay.sum((0, 1)) if decay is not None and decay.dim() == 1 else ddecay
    return {"q": dq, "k": dk, "v": dv, "beta": dbeta, "decay": ddecay, "initial_state": dinitial}


ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? decay, bool qk_l2norm, float scale, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool keep"
)
OP = custom.differentiable("delta_rule", ARGUMENTS, 9, _forward, _backward, forgets=("v",))
