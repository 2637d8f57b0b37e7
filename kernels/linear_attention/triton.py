"""Linear attention in Triton kernels, in every form but a value_decay beside other options; formulas in triton_kernels.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths; `normal` [B, T, Hv] is
scale q_t z_t^T, the normaliser, with which states have one more column, z: W of them.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, launch
from zoo.kernels.linear_attention.reference import SMALLEST
from zoo.kernels.packed import heads, per_token, sum_groups

# Up to that decay of a chunk scores are products of factors up to its inverse; digits set the limit of fp32.
MILD = {torch.bfloat16: 60.0, torch.float32: 4.0}


def supports(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> str | None:
    decay, value_decay, bonus, normalize, *_ = options
    most = 512 if value_decay is None else 256  # which takes the place of K
    if q.dtype == torch.float64:
        return "its kernels compute in fp32 and the inputs are fp64"
    if q.shape[3] > 256 or v.shape[3] > most:
        return f"it takes K up to 256 and V up to {most}, and they are {q.shape[3]} and {v.shape[3]}"
    if value_decay is not None and any(x is not None for x in (decay, bonus, normalize)):
        return "it takes a value_decay by itself"
    return launch.device_reason(q)


def run(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    decay, value_decay, bonus, normalize, scale, state, _, cu_seqlens = options
    if value_decay is not None:
        o, final = COLUMNS(heads(q, v), heads(k, v), v, value_decay, scale, state, cu_seqlens)
        return o, final
    args = (q, k, v, decay, normalize is not None, scale if normalize is None else 1.0, state, cu_seqlens)
    o, d, final = _read(*args) if bonus is None else _read_early(bonus, *args)
    if normalize is not None:
        o = o / torch.where(d.abs() < SMALLEST, torch.where(d < 0, -SMALLEST, SMALLEST), d).unsqueeze(-1)
    return o, final


def _read(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """scale q_t S_t, scale q_t z_t^T and the final state."""
    o, normal, final, _ = OP(q, k, v, decay, None, *rest, decay is not None and decay.requires_grad)
    return o, normal, final


def _read_early(
    bonus: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, normalize: bool, scale: float, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """scale q_t (S_{t-1} + Diag(bonus) k_t^T v_t): every query moves to the token before it, the first to one that
    writes nothing."""
    (state, cu_seqlens), (b, t) = rest, q.shape[:2]
    n = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    place = torch.arange(t, device=q.device)
    if cu_seqlens is not None:
        place = place + torch.searchsorted(cu_seqlens[1:], place, right=True)
        cu_seqlens = cu_seqlens + torch.arange(n + 1, device=q.device, dtype=torch.int32)

    def spread(x: Tensor, by: int) -> Tensor:
        return x.new_zeros(b, t + n // b, *x.shape[2:]).index_copy(1, place + by, x)

    each = per_token(decay, v)
    if each is not None:
        each = spread(each.squeeze(-1) if each.shape[-1] == 1 else each, 1)
    o, normal, final = _read(spread(q, 0), spread(k, 1), spread(v, 1), each, normalize, scale, state, cu_seqlens)
    own = scale * (heads(q, v).float() * bonus.reshape(bonus.shape[0], -1) * heads(k, v).float()).sum(-1)
    o = o.index_select(1, place).float() + own.unsqueeze(-1) * v.float()
    return o, normal.index_select(1, place) + own if normalize else normal, final


def chunk_size(dtype: torch.dtype) -> int:
    return 64 if launch.operand_dtype(dtype) == torch.bfloat16 else 32


def segment_size(length: int, heads: int) -> int:
    """Tokens that one program walks through: long sequences are cut so that a batch of one fills a GPU."""
    return 2048 if length <= 2048 else min(2048, max(512, launch.power(length * heads // (64 if heads >= 16 else 128))))


class Call:
    """What all kernels of one call share; `decay` is a log decay in any form, `gain` [B, T, Hv] a log gain of what each
    token writes. Segments and chunks follow from T and the heads alone."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, gain: Tensor | None, normalize: bool, scale: float,
        cu_seqlens: Tensor | None,
    ) -> None:  # fmt: skip
        self.kernels = importlib.import_module("zoo.kernels.linear_attention.triton_kernels")
        self.q, self.k, self.v, self.cu_seqlens = q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens
        self.decay, self.gain = (None if x is None else x.contiguous() for x in (decay, gain))
        self.form = 0 if decay is None else 2 - decay.dim() % 2  # as DECAY
        self.kind = launch.operand_dtype(q.dtype)
        self.chunk, self.segment = chunk_size(q.dtype), segment_size(q.shape[1], v.shape[2])
        self.normalize, self.scale, self.split = normalize, scale, q.shape[1] > self.segment
        self.tokens, self.state = v.shape[:3], (v.shape[2], q.shape[3], v.shape[3] + normalize)
        self.chunks = -(-min(q.shape[1], self.segment) // self.chunk)  # in every segment
        if self.split or cu_seqlens is None:
            self.plan = launch.plan(q.shape[0], q.shape[1], self.segment, cu_seqlens)
        else:
            n = cu_seqlens.shape[0] - 1
            self.plan = launch.Plan(n, 0, n, cu_seqlens[:-1], cu_seqlens.diff())

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def room(self) -> Tensor:
        """For the states at every chunk."""
        count = self.q.shape[0] * self.q.shape[1] // self.chunk + self.plan.count
        return self.empty(count, *self.state[:2], self.v.shape[3] + 8 * self.normalize, dtype=self.kind)

    def choice(self, kernel: str) -> tuple[dict[str, int], int]:
        """How to launch, and the tiles of V or K that programs share out."""
        k, v = self.q.shape[3], self.v.shape[3]
        chosen = launch.choice(f"linear_attention.{kernel}", k, self.q)
        if kernel == "walk" and self.normalize:
            chosen = chosen | {"num_warps": 8}
        whole = {"BK": launch.power(k), "BV": launch.power(v)}
        chosen = chosen | {name: min(chosen.get(name, size), size) for name, size in whole.items()}
        return chosen, {"walk": -(-v // chosen["BV"]), "gradients": -(-k // chosen["BK"])}.get(kernel, 1)

    def run(self, kernel: str, *tensors: Any, programs: int, **options: Any) -> None:
        """Launch with so many programs for each value head and tile."""
        language, function = importlib.import_module("triton.language"), getattr(self.kernels, kernel)
        (chosen, tiles), (hv, k, w) = self.choice(kernel), self.state
        options = chosen | {
            "starts": self.plan.starts, "counts": self.plan.sizes, "length": self.q.shape[1], "H": self.q.shape[2],
            "segments": self.plan.per_sequence, "per": self.chunks, "HV": hv, "tiles": tiles, "scale": self.scale,
            "K": k, "W": w, "V": self.v.shape[3], "C": self.chunk, "SEGMENT": self.segment, "NORM": self.normalize,
            "LEVELS": self.chunk.bit_length() - 1, "STAGES": chosen.get("num_stages"), "DECAY": self.form,
            "DT": language.bfloat16 if self.kind == torch.bfloat16 else language.float32,
            "PRECISION": launch.precision(self.q.dtype), "limit": MILD[self.kind],
        } | options  # fmt: skip
        options = {
            name: x for name, x in options.items() if name in function.arg_names or name.startswith(("num_", "maxnreg"))
        }
        launch.start(function, (programs * hv * tiles,), *tensors, **options)

    @cached_property
    def factors(self) -> tuple[Tensor | None, ...]:
        """Readers, writers, sums, sources, scores: under a decay per channel the readers and writers bear it."""
        if self.decay is None:
            return self.q, self.k, None, None, None
        # Differences of running sums must keep the digits of the inputs.
        wide, (hv, k, _) = torch.float32 if self.kind == torch.bfloat16 else torch.float64, self.state
        step = 0 if self.decay.dim() < 3 else hv * (k if self.form == 2 else 1)
        if self.form == 1:
            sums = self.empty(*self.tokens, dtype=wide)
            sources = None if self.gain is None else torch.empty_like(sums)
            self.run("prepare", self.decay, self.gain, sums, sources, programs=self.plan.count, step=step)
            return self.q, self.k, sums, sources, None
        x, y, sums = (self.empty(*self.tokens, k, dtype=dtype) for dtype in (self.kind, self.kind, wide))
        scores = self.empty(*self.tokens, self.chunk, dtype=self.kind)
        tensors, programs = (self.q, self.k, self.decay, x, y, sums, scores), self.plan.count * self.chunks
        self.run("scores", *tensors, programs=programs, step=step)
        return x, y, sums, None, scores

    def walk(self, reverse: bool, entering: Tensor | None, z: Tensor, **others: Tensor | None) -> None:
        """The others are out, normal, leaving, totals and states."""
        x, y, *factors = self.factors
        tensors = ((y, x) if reverse else (x, y)) + (z, *factors)
        options = dict.fromkeys(("out", "normal", "leaving", "totals", "states")) | others
        options |= {"H": self.state[0]} if self.form == 2 else {}  # readers and writers of value heads
        self.run("walk", *tensors, entering=entering, programs=self.plan.count, REVERSE=reverse, **options)

    def cross(
        self, reverse: bool, state: Tensor | None, z: Tensor, normal: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The states that enter the segments, of [N, Hv, K, W] that enter the sequences; the final ones; and these once
        more where a walk has yet to fill them in."""
        plan, (hv, k, w) = self.plan, self.state
        final = self.empty(plan.sequences, *self.state)
        if not self.split:
            return state, final, final
        states = self.empty(plan.count, *self.state)
        totals = self.empty(plan.count, hv, *([k] if self.form == 2 else []))
        self.walk(reverse, None, z, normal=normal, leaving=states, totals=totals)
        tensors, blocks = (state, states, totals, final, self.cu_seqlens, plan.first), -(-k * w // 1024)
        self.run("carry", *tensors, programs=plan.sequences * blocks, BLOCK=1024, REVERSE=reverse)
        return states, final, None

    def gradients(self, read: Tensor, *others: Tensor | None) -> None:
        x, y, *sums = self.factors[:4]
        tensors = (self.q, self.k, x, y, self.v, read, *sums, *others)
        self.run("gradients", *tensors, programs=self.plan.count * self.chunks)


ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? gain, bool normalize, float scale, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool wanted"
)


def _forward(*args: Any) -> tuple[Tensor | None, ...]:
    """o (fp32 where the caller divides it), the normaliser, the final state, and the states that enter segments."""
    *given, initial, cu_seqlens, _ = args
    call = Call(*[*given, cu_seqlens])
    o = torch.empty_like(call.v, dtype=torch.float32 if call.normalize else None)
    normal = call.empty(*call.tokens) if call.normalize else None
    entering, final, leaving = call.cross(False, None if initial is None else initial.contiguous(), call.v)
    call.walk(False, entering, call.v, out=o, normal=normal, leaving=leaving)
    return o, normal, final, entering if call.split else None


def _backward(given: dict[str, Any], results: Any, grads: Any) -> dict[str, Any]:
    names = ("q", "k", "v", "decay", "gain", "normalize", "scale", "cu_seqlens")
    call, initial = Call(*(given[name] for name in names)), given["initial_state"]
    do, d_normal, dfinal = (None if x is None else x.contiguous() for x in grads[:3])
    do = torch.zeros_like(results[0]) if do is None else do
    d_normal = torch.zeros_like(results[1]) if d_normal is None and call.normalize else d_normal
    entering = results[3] if call.split else None if initial is None else initial.contiguous()
    before, after, dv = call.room(), call.room(), torch.empty_like(call.v)
    call.walk(False, entering, call.v, states=before)
    outer, dinitial, leaving = call.cross(True, dfinal, do, d_normal)
    call.walk(True, outer, do, out=dv, normal=d_normal, leaving=leaving, states=after)
    # Value heads of a group, and tiles, write apart and are summed after: no atomics.
    (hv, k, _), h = call.state, call.q.shape[2]
    dq, dk = (call.empty(*call.tokens, k, dtype=call.q.dtype if h == hv else torch.float32) for _ in range(2))
    parts = k if call.form == 2 else call.choice("gradients")[1]
    d_decay, d_gain = (call.empty(*call.tokens, parts) if given["wanted"] and x is not None else None
                       for x in (call.decay, call.gain))  # fmt: skip
    call.gradients(do, d_normal, before, after, dq, dk, d_decay, d_gain)
    dq, dk = (sum_groups(x, call.q) for x in (dq, dk))
    if d_decay is not None and (
        axes := [*((0, 1) if given["decay"].dim() < 3 else ()), *([3] if call.form == 1 else [])]
    ):
        d_decay = d_decay.sum(axes)
    found = {"q": dq, "k": dk, "v": dv, "decay": d_decay, "gain": None if d_gain is None else d_gain.sum(-1)}
    return found | {"initial_state": None if initial is None else dinitial}


OP = custom.differentiable("linear_attention", ARGUMENTS, 4, _forward, _backward)


def _swapped(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.mT.contiguous()


def _columns(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """o and the final state under a decay [B, T, Hv, V] on the value axis, with a key head for every value head: what
    the gradient of q is under a decay on the key axis, with v, k and q for k, v and do."""
    call, o = Call(v, v, k, decay, None, False, scale, cu_seqlens), torch.empty_like(v)
    before = call.room()
    entering, final, leaving = call.cross(False, _swapped(state), call.v)
    call.walk(False, entering, call.v, leaving=leaving, states=before)
    call.gradients(q.contiguous(), None, before, None, o, None, None, None)
    return o, _swapped(final)


def _columns_backward(given: dict[str, Any], results: Any, grads: Any) -> dict[str, Any]:
    do, dfinal = torch.zeros_like(results[0]) if grads[0] is None else grads[0], _swapped(grads[1])
    call = given | {"q": do, "k": given["v"], "v": given["k"], "gain": None, "normalize": False, "wanted": True}
    call["initial_state"] = _swapped(given["state"])
    dq, *rest = _forward(*(call[field.split()[1]] for field in ARGUMENTS.split(",")))
    found = _backward(call, [dq, *rest], [given["q"], None, dfinal])
    state = _swapped(found["initial_state"])
    return {"q": dq, "k": found["v"], "v": found["k"], "decay": found["decay"], "state": state}


COLUMNS = custom.differentiable(
    "linear_attention_columns",
    "Tensor q, Tensor k, Tensor v, Tensor decay, float scale, Tensor? state, Tensor? cu_seqlens",
    2, _columns, _columns_backward,
)  # fmt: skip
