"""Diagonal-plus-low-rank transitions in Triton kernels, every form of decay; and, with beta in place of a and b, the
delta rule with a decay per channel. The formulas are in triton_forward and triton_backward.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, launch

PER_CHUNK = ("prepare", "pairs", "gradients")


def supports(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str | None:
    if q.dtype == torch.float64:
        return "its kernels compute in fp32 and the inputs are fp64"
    if q.shape[3] > 256 or v.shape[3] > 512:
        return f"it takes K up to 256 and V up to 512, and they are {q.shape[3]} and {v.shape[3]}"
    if q.is_cuda and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return "its bf16 gradients were wrong on an H200 before their last change and have not been checked there since"
    return launch.device_reason(q)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    return call(q, k, v, a, b, None, decay, False, scale, initial_state, output_final_state, cu_seqlens)


def call(*args: Any) -> tuple[Tensor, Tensor | None]:
    """The arguments of the op, with `output_final_state` before cu_seqlens."""
    *given, output_final_state, cu_seqlens = args
    saves = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
    o, final, *_ = OP(*given, cu_seqlens, saves)
    return o, final if output_final_state else None


def chunk_size(dtype: torch.dtype, width: int) -> int:
    """64 tokens, or 32 where operands of 4 bytes or wide keys would not leave room for the tiles."""
    return 64 if dtype == torch.bfloat16 and launch.power(width) <= 128 else 32


class Call:
    """What all kernels of one call share: its inputs by name, and what follows from their shapes."""

    def __init__(self, inputs: dict[str, Tensor | None], width: int, norm: bool, scale: float, cu: Tensor | None):
        self.inputs: dict[str, Any] = {name: None if x is None else x.contiguous() for name, x in inputs.items()}
        self.q, decay = self.inputs["q"], self.inputs["decay"]
        self.delta, self.value_width, self.cu_seqlens = inputs["beta"] is not None, width, cu
        self.heads = self.inputs["v"].shape[2]
        self.chunk, self.low = chunk_size(self.q.dtype, self.q.shape[3]), launch.operand_dtype(self.q.dtype)
        self.plan = plan = launch.plan(self.q.shape[0], self.q.shape[1], self.chunk, cu)
        language = importlib.import_module("triton.language")
        form = 0 if decay is None else decay.dim()
        self.options = self.inputs | {
            **{"length": self.q.shape[1], "chunks": plan.per_sequence, "H": self.q.shape[2], "HV": self.heads},
            **{"scale": scale, "K": self.q.shape[3], "V": width, "C": self.chunk, "NORM": norm, "DELTA": self.delta},
            **{"LEVELS": self.chunk.bit_length() - 1, "PRECISION": launch.precision(self.q.dtype)},
            **{"DT": language.bfloat16 if self.low == torch.bfloat16 else language.float32, "PACKED": cu is not None},
            **{"DECAY": form > 0, "PER_TOKEN": form > 2, "PER_CHANNEL": form in (2, 4)},
            **{"starts": plan.starts, "counts": plan.sizes, "cu_seqlens": cu, "first_chunk": plan.first},
        }

    def rows(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.q.new_empty(*self.q.shape[:2], self.heads, width, dtype=dtype or self.low)

    def states(self, count: int, dtype: torch.dtype) -> Tensor:
        return self.q.new_empty(count, self.heads, self.q.shape[3], self.value_width, dtype=dtype)

    def start(self, file: str, name: str, **given: Any) -> None:
        """Launch a kernel with one program per chunk or sequence, value head and (of a scan) tile of V."""
        kernel = getattr(importlib.import_module(f"zoo.kernels.dplr.triton_{file}"), name)
        width, per_chunk = self.q.shape[3], name in PER_CHUNK
        chosen = {"BK": 256} | launch.choice(f"dplr.{name}", width, self.q)
        chosen["BK"] = min(chosen["BK"], launch.power(width))
        chosen["BV"] = min(chosen["BV"], launch.power(self.value_width))
        while not per_chunk and chosen["BV"] > 16 and self.heads * -(-self.value_width // chosen["BV"]) < 64:
            chosen["BV"] //= 2  # enough programs; by the shape of one sequence, so that no result depends on the batch
        tiles = 1 if per_chunk else -(-self.value_width // chosen["BV"])
        tiles = -(-width // chosen["BK"]) if name == "gradients" else tiles
        options = self.options | chosen | {"tiles": tiles} | given
        names = {*kernel.arg_names, "num_warps", "num_stages"}
        programs = ((self.plan.count if per_chunk else self.plan.sequences) * self.heads * tiles,)
        launch.start(kernel, programs, **{name: x for name, x in options.items() if name in names})


def _forward(*args: Any) -> tuple[Tensor, ...]:
    """o, the final state, and what the backward pass needs: sums, norms, squares, factors, u and entering."""
    *inputs, norm, scale, initial_state, cu_seqlens, saves = args
    call = Call(dict(zip(INPUTS, inputs, strict=True)), inputs[2].shape[3], norm, scale, cu_seqlens)
    width, delta, count = call.q.shape[3], call.delta, call.plan.count
    o, final = (
        torch.empty_like(inputs[2], memory_format=torch.contiguous_format),
        call.states(call.plan.sequences, torch.float32),
    )
    saved = {
        "sums": call.rows(width, torch.float32 if call.low == torch.bfloat16 else torch.float64),
        "norms": call.rows(2 if norm else 0, torch.float32),
        "squares": call.rows(call.chunk * (2 if delta else 4)),
        "factors": call.rows(width * (3 if delta else 4)),
        "u": call.rows(call.value_width),
        "entering": call.states(count if saves else 0, call.low),
    }
    call.start("forward", "prepare", **saved)
    initial = None if initial_state is None else initial_state.contiguous()
    flags = {"INITIAL": initial is not None, "SAVE": saves}
    call.start("forward", "scan", **saved, initial=initial, final=final, o=o, **flags)
    return o, final, *(x if saves else o.new_empty(0) for x in saved.values())


def _backward(given: dict[str, Any], results: list[Tensor], grads: list[Tensor | None]) -> dict[str, Any]:
    o, _, *kept = results
    inputs = {name: given[name] for name in INPUTS}
    call = Call(inputs, o.shape[3], given["qk_l2norm"], given["scale"], given["cu_seqlens"])
    do, dfinal = (None if x is None else x.contiguous() for x in grads[:2])
    restarts, decay, width = given["initial_state"] is not None, given["decay"], call.q.shape[3]
    dinitial = call.states(call.plan.sequences if restarts else 0, torch.float32)
    flow = dict(zip(("sums", "norms", "squares", "factors", "u", "entering"), kept, strict=True))
    flow |= {"o": o, "do": torch.zeros_like(o) if do is None else do}
    flow |= {"du": torch.empty_like(flow["u"]), "leaving": torch.empty_like(flow["entering"])}
    flags = {"INITIAL": restarts, "FINAL": dfinal is not None}
    call.start("backward", "scan_backward", **flow, dfinal=dfinal, dinitial=dinitial, **flags)
    dx = torch.empty_like(flow["u"])
    flow |= {
        "dx": dx,
        "dv": dx if call.delta else torch.empty_like(o),
        "products": call.rows(3 if call.delta else 0, torch.float32),
    }
    flow["d_squares"] = call.rows(call.chunk * (2 if call.delta else 4))
    call.start("backward", "pairs", **flow)
    # Value heads of a group write apart and are summed after: no atomics.
    wide = call.q.dtype if call.heads == call.q.shape[2] else torch.float32
    sides = {f"d{name}": call.rows(width, wide) for name in ("q", "k", "a", "b") if inputs[name] is not None}
    tiles = -(-width // min(launch.choice("dplr.gradients", width, call.q)["BK"], launch.power(width)))
    dbeta = call.rows(tiles if call.delta else 0, torch.float32)
    ddecay = call.rows(0 if decay is None else width, torch.float32)
    call.start("backward", "gradients", **flow, dbeta=dbeta, ddecay=ddecay, **({"da": None, "db": None} | sides))
    found = {name: call.q.new_empty(0) for name in INPUTS}  # apart: no two results may be one tensor
    found |= {name[1:]: _sum_groups(x, call.q) for name, x in sides.items()}
    found |= {"v": flow["dv"].to(o.dtype)} | ({"initial_state": dinitial} if restarts else {})
    found |= {"beta": dbeta.sum(3)} if call.delta else {}
    if decay is not None:
        ddecay = ddecay if decay.dim() % 2 == 0 else ddecay.sum(3)
        found["decay"] = ddecay if decay.dim() > 2 else ddecay.sum((0, 1))
    return found


def _sum_groups(x: Tensor, like: Tensor) -> Tensor:
    """[B, T, Hv, K] to [B, T, H, K] in the dtype of `like`."""
    return x if x.shape == like.shape else x.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


INPUTS = ("q", "k", "v", "a", "b", "beta", "decay")
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? a, Tensor? b, Tensor? beta, Tensor? decay, bool qk_l2norm, float scale, "
    "Tensor? initial_state, Tensor? cu_seqlens, bool saves"
)
OP = custom.differentiable("dplr", ARGUMENTS, 8, _forward, _backward)
