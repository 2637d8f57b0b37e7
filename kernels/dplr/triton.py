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
from zoo.kernels.packed import sum_groups

FORWARD, BACKWARD = "dplr.triton_forward", "dplr.triton_backward"
# Up to that decay of a chunk its scores are products of factors at most exp(MILD / 2); digits set the limit of fp32.
MILD = {torch.bfloat16: 80.0, torch.float32: 4.0}
PER_CHUNK = ("prepare", "pairs", "gradients")


def supports(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str | None:
    if q.dtype == torch.float64:
        return "its kernels compute in fp32 and the inputs are fp64"
    if q.shape[3] > 256 or v.shape[3] > 512:
        return f"it takes K up to 256 and V up to 512, and they are {q.shape[3]} and {v.shape[3]}"
    return launch.device_reason(q)


def run(*args: Any) -> tuple[Tensor, Tensor | None]:
    q, k, v, a, b, decay, *rest = args
    return call(q, k, v, a, b, None, decay, False, *rest)


def call(*args: Any) -> tuple[Tensor, Tensor | None]:
    """The arguments of the op, with `output_final_state` before cu_seqlens."""
    *given, output_final_state, cu_seqlens = args
    saves = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
    o, final, *_ = OP(*given, cu_seqlens, saves)
    return o, final if output_final_state else None


def chunk_size(dtype: torch.dtype, width: int) -> int:
    """64 tokens, or 32 where operands of 4 bytes or wide keys would not leave room for the tiles."""
    return 64 if dtype == torch.bfloat16 and launch.power(width) <= 128 else 32


def segment_size(length: int, heads: int, width: int) -> int:
    """Tokens that one program walks through: long sequences are cut so that a batch of one fills a GPU."""
    programs = heads * -(-width // 64)
    count = min(256 // programs, length // max(512, 64 * programs)) if length > 2048 else 1
    return max(1, -(-length // (64 * max(1, count)))) * 64


class Call:
    """What all kernels of one call share: its inputs by name, and what follows from their shapes."""

    def __init__(self, inputs: dict[str, Tensor | None], width: int, norm: bool, scale: float, cu: Tensor | None):
        self.inputs: dict[str, Any] = {name: None if x is None else x.contiguous() for name, x in inputs.items()}
        self.q, decay = self.inputs["q"], self.inputs["decay"]
        self.delta, self.value_width, self.cu_seqlens = inputs["beta"] is not None, width, cu
        self.heads, (b, t, h, k) = self.inputs["v"].shape[2], self.q.shape
        self.chunk, self.low = chunk_size(self.q.dtype, k), launch.operand_dtype(self.q.dtype)
        self.plan = plan = launch.plan(b, t, self.chunk, cu)
        self.segment = segment_size(t, self.heads, width)
        language = importlib.import_module("triton.language")
        form = 0 if decay is None else decay.dim()
        self.options = self.inputs | {
            **{"length": t, "chunks": plan.per_sequence, "H": h, "HV": self.heads, "PACKED": cu is not None},
            **{"scale": scale, "K": k, "V": width, "C": self.chunk, "NORM": norm, "DELTA": self.delta},
            **{"LEVELS": self.chunk.bit_length() - 1, "PRECISION": launch.precision(self.q.dtype)},
            **{"DT": language.bfloat16 if self.low == torch.bfloat16 else language.float32, "limit": MILD[self.low]},
            **{"DECAY": form > 0, "PER_TOKEN": form > 2, "PER_CHANNEL": form in (2, 4), "segment": self.segment},
            **{"starts": plan.starts, "counts": plan.sizes, "cu_seqlens": cu, "first_chunk": plan.first},
        }

    def rows(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.q.new_empty(*self.q.shape[:2], self.heads, width, dtype=dtype or self.low)

    def states(self, count: int, dtype: torch.dtype) -> Tensor:
        return self.q.new_empty(count, self.heads, self.q.shape[3], self.value_width, dtype=dtype)

    def borders(self, rows: int) -> Tensor | None:
        """Room for so many rows of K at every place where a segment may end and another begin, if there is one."""
        b, t, _, k = self.q.shape
        shape = b * t // self.segment, self.heads, rows, k
        return self.q.new_empty(shape, dtype=torch.float32) if t > self.segment else None

    def start(self, file: str, name: str, **given: Any) -> None:
        """Launch a kernel with one program per value head and chunk (and tile of K), or (scans) tile of V, sequence
        and segment."""
        width, t, per_chunk = self.q.shape[3], self.q.shape[1], name in PER_CHUNK
        kernel = getattr(importlib.import_module(f"zoo.kernels.{file}"), name)
        chosen = {"BK": 256} | launch.choice(f"{'delta_rule' if name == 'carry' else 'dplr'}.{name}", width, self.q)
        chosen["BK"] = min(chosen["BK"], launch.power(width))
        chosen["BV"] = min(chosen.get("BV", 16), launch.power(self.value_width))
        segments = 1 if per_chunk or name == "carry" else max(1, -(-t // self.segment))
        tiles = {"gradients": -(-width // chosen["BK"])}.get(
            name, 1 if per_chunk else -(-self.value_width // chosen["BV"])
        )
        tiles += -(-width // chosen["BV"]) if name == "scan" and given["LEAN"] else 0
        options = self.options | chosen | {"tile_count": tiles, "segments": segments} | given
        names = {*kernel.arg_names, "num_warps", "num_stages", "maxnreg"}
        programs = (self.plan.count if per_chunk else self.plan.sequences * segments) * self.heads * tiles
        launch.start(kernel, (programs,), **{name: x for name, x in options.items() if name in names})

    def scan(self, file: str, name: str, crossing: Tensor | None, transitions: Tensor | None, **given: Any) -> None:
        """Launch a scan, with the states at the ends of segments found first."""
        if crossing is not None:
            self.start(file, name, crossing=crossing, LEAN=True, **given)
            reverse = name == "scan_backward"
            self.start("delta_rule.triton_kernels", "carry", states=crossing, crossing=transitions, REVERSE=reverse)
        self.start(file, name, crossing=crossing, LEAN=False, **given)


def _forward(*args: Any) -> tuple[Tensor | None, ...]:
    """o, the final state, and what the backward pass needs: sums, norms, squares, factors, entering and crossing."""
    *inputs, norm, scale, initial_state, cu_seqlens, saves = args
    call = Call(dict(zip(INPUTS, inputs, strict=True)), inputs[2].shape[3], norm, scale, cu_seqlens)
    width, delta = call.q.shape[3], call.delta
    o = torch.empty_like(inputs[2], memory_format=torch.contiguous_format)
    final = call.states(call.plan.sequences, torch.float32)
    saved = {
        "sums": call.rows(width, torch.float32 if call.low == torch.bfloat16 else torch.float64),
        "norms": call.rows(2 if norm else 0, torch.float32),
        "squares": call.rows(call.chunk * (2 if delta else 4)),
        "factors": call.rows(4 * width),
        "entering": call.states(call.plan.count if saves else 0, call.low),
    }
    call.start(FORWARD, "prepare", **saved)
    initial = None if initial_state is None else initial_state.contiguous()
    crossing = call.borders(call.value_width + width)
    call.scan(FORWARD, "scan", crossing, crossing, **saved, initial=initial, final=final, o=o, SAVE=saves)
    return o, final, *(x if saves else None for x in (*saved.values(), crossing))


def _backward(given: dict[str, Any], results: list[Tensor], grads: list[Tensor | None]) -> dict[str, Any]:
    o, _, *kept = results
    inputs = {name: given[name] for name in INPUTS}
    call = Call(inputs, o.shape[3], given["qk_l2norm"], given["scale"], given["cu_seqlens"])
    do, dfinal = (None if x is None else x.contiguous() for x in grads[:2])
    restarts, decay, width = given["initial_state"] is not None, given["decay"], call.q.shape[3]
    dinitial = call.states(call.plan.sequences, torch.float32) if restarts else None
    *kept, transitions = kept
    flow = dict(zip(("sums", "norms", "squares", "factors", "entering"), kept, strict=True))
    flow |= {"o": o, "do": torch.zeros_like(o) if do is None else do}
    flow["leaving"] = torch.empty_like(flow["entering"])
    crossing, ends = call.borders(call.value_width), {"dfinal": dfinal, "dinitial": dinitial}
    call.scan(BACKWARD, "scan_backward", crossing, transitions, **flow, **ends)
    u, dx = call.rows(call.value_width), call.rows(call.value_width)
    flow |= {"u": u, "dx": dx, "dv": dx if call.delta else torch.empty_like(o)}
    flow["products"] = call.rows(3 if call.delta else 0, torch.float32)
    flow["d_squares"] = call.rows(call.chunk * (2 if call.delta else 4))
    call.start(BACKWARD, "pairs", **flow)
    # Value heads of a group write apart and are summed after: no atomics.
    wide = call.q.dtype if call.heads == call.q.shape[2] else torch.float32
    sides = {f"d{name}": call.rows(width, wide) for name in ("q", "k", "a", "b") if inputs[name] is not None}
    tiles = -(-width // min(launch.choice("dplr.gradients", width, call.q)["BK"], launch.power(width)))
    dbeta = call.rows(tiles if call.delta else 0, torch.float32)
    ddecay = call.rows(0 if decay is None else width, torch.float32)
    call.start(BACKWARD, "gradients", **flow, dbeta=dbeta, ddecay=ddecay, **({"da": None, "db": None} | sides))
    found = {name[1:]: sum_groups(x, call.q) for name, x in sides.items()}
    found |= {"v": flow["dv"].to(o.dtype)} | ({} if dinitial is None else {"initial_state": dinitial})
    found |= {"beta": dbeta.sum(3)} if call.delta else {}
    if decay is not None:
        ddecay = ddecay if decay.dim() % 2 == 0 else ddecay.sum(3)
        found["decay"] = ddecay if decay.dim() > 2 else ddecay.sum((0, 1))
    return found


INPUTS = ("q", "k", "v", "a", "b", "beta", "decay")
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? a, Tensor? b, Tensor? beta, Tensor? decay, bool qk_l2norm, float scale, "
    "Tensor? initial_state, Tensor? cu_seqlens, bool saves"
)
OP = custom.differentiable("dplr", ARGUMENTS, 8, _forward, _backward)
