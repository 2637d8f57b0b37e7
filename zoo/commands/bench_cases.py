"""What `zoo bench kernels` measures: inputs of every op, what a call must move and compute, and when it is right.

Shapes: B batch, T tokens, H heads, D head width of keys and (unless a case says otherwise) values.
"""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from zoo import registry

Tensors = dict[str, Tensor]
SHAPES = [(8, 2048, 16, 128), (2, 8192, 16, 128), (1, 32768, 16, 128), (1, 8192, 8, 128)]
SHAPES += [(b, t, 2 * h, 64) for b, t, h, _ in SHAPES]
WIDE = (2, 8192, 4, 256)  # of GLA, RetNet and Gated DeltaNet, with V = 512
DECODE = (64, 1, 16, 128)
SMALL = [(2, 128, 2, 16)]  # without a GPU
VARIANTS = {"linear_attention": ("none", "head", "token", "channel"), "delta_rule": ("none", "token", "channel")}
VARIANTS |= dict.fromkeys(("dplr", "scan", "selective_scan", "weighted_average"), ("channel",))
VARIANTS |= {"mlstm": ("token",), "attention": ("none",), "short_conv": ("none",)}
FIXED: Any = {"delta_rule": {"qk_l2norm": True}, "dplr": {"scale": 1.0}, "short_conv": {"activation": "silu"}}
DECODED = ("linear_attention", "delta_rule", "dplr")
# Relative RMS of outputs and of gradients, and the worst element by the largest.
TOLERANCES = dict.fromkeys((torch.bfloat16, torch.float16), (5e-3, 8e-3, 2e-2)) | {torch.float32: (1e-5, 1e-5, 1e-4)}
FLOPS = {"linear_attention": 4, "delta_rule": 6, "dplr": 8, "mlstm": 4}  # per K * V entry of a state and token


def kernels(name: str) -> Any:
    """A module of the kernel layer."""
    return importlib.import_module(f"{registry.KINDS['kernels']}.{name}")


@dataclass(frozen=True)
class Case:
    op: str
    variant: str
    B: int
    T: int
    H: int
    D: int
    dtype: str = "bfloat16"
    direction: str = "fwd"
    options: str = ""

    @property
    def label(self) -> str:
        shape = f"({self.B},{self.T},{self.H},{self.D})"
        return " ".join(f"{self.op} {self.variant} {self.options} {shape} {self.direction}".split())

    @property
    def torch_dtype(self) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, self.dtype))

    @property
    def V(self) -> int:
        return 512 if self.options == "V=512" else self.D


def cases(gpu: bool, dtype: str = "bfloat16") -> list[Case]:
    """Every case, on a GPU or in the small sizes that a CPU runs."""
    found, ways = [], ("fwd", "fwdbwd")
    for op, variant in ((op, variant) for op, variants in VARIANTS.items() for variant in variants):
        shapes = SMALL if not gpu else [s for s in SHAPES if op != "dplr" or s[3] == 64]
        for options in ("", f"window={2048 if gpu else 32}") if op == "attention" else ("",):
            found += [Case(op, variant, *s, dtype, way, options) for s in shapes for way in ways]
        if gpu and (op == "linear_attention" or (op, variant) == ("delta_rule", "token")):
            found += [Case(op, variant, *WIDE, dtype, way, "V=512") for way in ways]
        if op in DECODED:
            found.append(Case(op, variant, *(DECODE if gpu else (2, 1, 2, 16)), dtype, "decode"))
    return found


# Inputs of each op as "name axes factor kind": W is H * D, n the states of a channel, 4 a filter's width; `normal` are
# normal numbers in the case's dtype, `gate` the same in fp32, `uniform` numbers from 0 to 1 in fp32.
QKV = "q BTHD 1 normal, k BTHD 1 normal, v BTHV 1 normal"
INPUTS = {
    "linear_attention": QKV,
    "delta_rule": f"{QKV}, beta BTH 1 uniform",
    "dplr": f"{QKV}, a BTHD 1 gate, b BTHD 1 uniform",
    "mlstm": f"{QKV}, input_gate BTH 1 gate, forget_gate BTH 1 gate",
    "scan": "x BTW 1 normal, decay BTW -1 uniform",
    "selective_scan": "x BTW 1 normal, dt BTW .1 uniform, A Wn 1 gate, B BTn 1 normal, C BTn 1 normal, D W 1 gate",
    "weighted_average": "k BTW 1 normal, v BTW 1 normal, decay W -1 uniform, bonus W 1 uniform",
    "attention": QKV,
    "short_conv": "x BTW 1 normal, weight W4 1 normal",
}
DECAYS = {"head": "H", "token": "BTH", "channel": "BTHD"}  # of the ops with a state [K, V], by variant


def tensors(case: Case, device: str, seed: int = 0) -> Tensors:
    generator, made = torch.Generator(device).manual_seed(seed), {}
    sizes = {"B": case.B, "T": case.T, "H": case.H, "D": case.D, "V": case.V, "W": case.H * case.D, "n": 16, "4": 4}
    text = INPUTS[case.op]
    if case.op in DECODED and case.variant in DECAYS:
        text += f", decay {DECAYS[case.variant]} -0.3 uniform"
    if case.direction == "decode":
        text += ", state BHDV 1 gate"
    for name, axes, factor, kind in (entry.split() for entry in text.split(", ")):
        draw = torch.rand if kind == "uniform" else torch.randn
        x = float(factor) * draw([sizes[axis] for axis in axes], generator=generator, device=device)
        made[name] = x.to(case.torch_dtype) if kind == "normal" else x
    if case.op == "dplr":
        kappa = torch.nn.functional.normalize(made["a"], dim=-1)
        made |= {"a": -kappa.to(case.torch_dtype), "b": (kappa * made["b"]).to(case.torch_dtype)}
    if case.op == "mlstm":
        made["forget_gate"] += 3
    if case.op == "selective_scan":
        made["A"] = -torch.arange(1, 17, device=device).float().expand_as(made["A"]).contiguous()
    return made


def options(case: Case) -> dict[str, Any]:
    if case.options.startswith("window="):
        return {"window": int(case.options.partition("=")[2])}
    return dict(FIXED.get(case.op, ()))


def function(case: Case) -> Callable[..., Any]:
    name = f"{case.op}_step" if case.direction == "decode" else case.op
    return cast(Callable[..., Any], registry.get("kernels", case.op, name))


def caller(case: Case) -> Callable[[Tensors], Tensor]:
    """A function of the tensors of a case, with its options, that returns the output alone."""
    call, fixed = function(case), options(case)
    return lambda made: flat(call(**made, **fixed))[0]


def traffic(case: Case, made: Mapping[str, Tensor]) -> int:
    """Bytes moved at least: of a step the state, read and written; else inputs, results and their gradients, once."""
    if case.direction == "decode":
        return 2 * made["state"].nbytes
    given = sum(x.nbytes for x in made.values())
    result = case.B * case.T * case.H * case.V * case.torch_dtype.itemsize
    return given + result if case.direction == "fwd" else 3 * given + 2 * result


def operations(case: Case) -> float:
    """Multiplications and additions of products at least; the recurrences as they are written."""
    rows = case.B * case.T * case.H
    if case.op == "attention":
        window = min(options(case).get("window", case.T), case.T)
        visible = window * (window + 1) / 2 + (case.T - window) * window
        return 2 * case.B * case.H * visible * (case.D + case.V) * (1 if case.direction == "fwd" else 3.5)
    once = FLOPS.get(case.op, 0) * rows * case.D * case.V
    return once * (3 if case.direction == "fwdbwd" else 1)


def flat(value: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value if item is not None for x in flat(item)] if isinstance(value, (tuple, list)) else []


def evaluate(call: Callable[..., Any], made: Mapping[str, Tensor], **settings: Any) -> Tensors:
    """Every output of a call, and under "d" and its name the gradient for every tensor.

    The loss weighs every row of an output with numbers of its own, so that a row counts the same in another batch.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in made.items()}
    outputs = flat(call(**leaves, **settings))
    weights = [_weights(x, 1000 * i) for i, x in enumerate(outputs)]
    finite = [torch.where(x.isfinite(), x, torch.zeros_like(x)) for x in outputs]
    grads = torch.autograd.grad(finite, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
    found = {f"output{i}": x.detach() for i, x in enumerate(outputs)}
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _weights(x: Tensor, seed: int) -> Tensor:
    """Random numbers that bf16 holds, so that they are the same beside every dtype."""
    weights = torch.zeros(x.shape, device=x.device)
    for i, row in enumerate(weights):
        row.normal_(generator=torch.Generator(x.device).manual_seed(seed + i))
    return weights.bfloat16().to(x.dtype)


@contextmanager
def watched(module: str, name: str, note: Callable[..., None]) -> Iterator[None]:
    """Inside, `note` is called with every result of a function of the kernel layer and its arguments."""
    owner = kernels(module)
    function = getattr(owner, name)

    def noted(*args: Any) -> Any:
        found = function(*args)
        note(found, *args)
        return found

    setattr(owner, name, noted)
    try:
        yield
    finally:
        setattr(owner, name, function)


def exact(made: Mapping[str, Tensor]) -> Tensors:
    """The same rounded numbers in fp64 (complex128)."""
    return {name: x.to(torch.complex128 if x.is_complex() else torch.float64) for name, x in made.items()}


def errors(found: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Relative RMS and worst element by name; infinite where only one of the two is finite."""
    sizes = {}
    for name, right in want.items():
        have = found[name].to(right.dtype)
        finite = right.isfinite()
        if not torch.equal(have[~finite], right[~finite]) or not have[finite].isfinite().all():
            sizes[name] = (math.inf, math.inf)
        elif finite.any():
            error, right = (have - right)[finite], right[finite]
            norm, most = right.norm().item(), right.abs().max().item()
            # What is zero (a gradient that cancels, say) is measured absolutely.
            sizes[name] = (error.norm().item() / (norm or 1.0), error.abs().max().item() / (most or 1.0))
    return sizes


def faults(sizes: Mapping[str, tuple[float, float]], dtype: torch.dtype) -> list[str]:
    """What misses the tolerances, in words."""
    *limits, worst = TOLERANCES[dtype]  # of outputs and of gradients
    missed = [n for n, (rms, most) in sizes.items() if not (rms <= limits[n.startswith("d")] and most <= worst)]
    return [f"{name} {sizes[name][0]:.1e}/{sizes[name][1]:.1e}" for name in missed]


def gate(case: Case, device: str) -> list[str]:
    """What is wrong with the outputs, states and gradients of a case, beside the truth in fp64."""
    dtype = case.torch_dtype
    if case.direction == "decode":
        made = tensors(case, device)
        state, truth = made.pop("state"), exact(made)
        right = {"state": state.double()}
        right["o"] = function(case)(**truth, **right, **options(case))
        o = function(case)(**made, state=state, **options(case))
        return faults(errors({"o": o, "state": state}, right), dtype)
    made, call = tensors(case, device), function(case)
    extra = {"return_lse": True} if case.op == "attention" else {"output_final_state": True}
    backend = "chunked" if device == "cuda" else "reference"
    found = evaluate(call, made, **options(case), **extra)
    right = evaluate(call, exact(made), backend=backend, **options(case), **extra)
    return faults(errors(found, right), dtype)
