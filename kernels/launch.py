"""What every Triton backend needs to know before it launches: where it can run, in which precision, on which chunks.

Shapes: B batch, T tokens, N sequences, C tokens per chunk.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels; it reads the variable when they are defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def device_reason(x: Tensor) -> str | None:
    """Why Triton kernels cannot run where x lies, if they cannot."""
    if interpreting():
        return None
    if x.device.type != "cuda":
        return f"Triton kernels need a CUDA device and the inputs are on {x.device} (TRITON_INTERPRET=1 emulates one)"
    major, minor = torch.cuda.get_device_capability(x.device)
    if major < 8:
        return f"its products need compute capability 8.0 and {x.device} has {major}.{minor}"
    if assembler() is None:
        return "ptxas before 12.9 miscompiles its products; triton 3.6 or later brings one, TRITON_PTXAS_PATH names one"
    return None


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products take: bf16 as it is; fp16 and fp32 in fp32 (the range of fp16 is too small for states and their
    gradients). The interpreter has no bf16 arithmetic."""
    return dtype if dtype == torch.bfloat16 and not interpreting() else torch.float32


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: TF32 keeps all of fp16's digits, three of them keep those of fp32."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def power(width: int) -> int:
    """The tile that holds `width` numbers: a power of two, at least 16 as products want."""
    return max(16, 1 << (width - 1).bit_length())


@dataclass(frozen=True)
class Plan:
    """Chunks of one call. Without packing the kernels compute everything from `per_sequence`, the chunks of each."""

    count: int
    per_sequence: int
    sequences: int
    starts: Tensor | None = None  # [count] first token of each chunk
    sizes: Tensor | None = None  # [count] tokens of each chunk; those left over have none
    first: Tensor | None = None  # [N] first chunk of each sequence


def chunk_count(batch: int, length: int, size: int, cu_seqlens: Tensor | None) -> int:
    """Chunks of a call; for packed sequences as many as always suffice, from shapes alone."""
    if cu_seqlens is None:
        return batch * -(-length // size)
    return length // size + cu_seqlens.shape[0] - 1


def plan(batch: int, length: int, size: int, cu_seqlens: Tensor | None) -> Plan:
    """Laid out on the device: no value of cu_seqlens is read on the host."""
    count = chunk_count(batch, length, size, cu_seqlens)
    if cu_seqlens is None:
        return Plan(count, -(-length // size), batch)
    begins, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    ends = ((lengths + size - 1) // size).cumsum(0)
    first = ends - (lengths + size - 1) // size
    chunk = torch.arange(count, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, chunk, right=True).clamp(max=lengths.shape[0] - 1)
    offset = (chunk - first[sequence]) * size
    sizes = (lengths[sequence] - offset).clamp(0, size)
    return Plan(count, 0, lengths.shape[0], begins[sequence] + offset, sizes, first)


_local = threading.local()


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, `start` launches nothing: what is left of a function is the shapes of its results."""
    before, _local.held = getattr(_local, "held", False), True
    try:
        yield
    finally:
        _local.held = before


_assemblers: list[str | None] = []
_assembling = threading.RLock()


@torch.compiler.assume_constant_result
def assembler() -> str | None:
    """The first ptxas of release 12.9 or later among that of the settings and those that triton brings.

    12.8, which triton 3.4 to 3.7 take for Hopper, miscompiles tensor core products: on an H200 the same PTX gave wrong
    numbers and illegal addresses with it, and right ones with 12.9 or with 12.8 that does not optimise.
    """
    if not _assemblers:  # a list and not `cache`, which a compiler would look behind
        settings = importlib.import_module("triton").knobs.nvidia
        tools = (tool for tool in (settings.ptxas, settings.ptxas_blackwell) if tool is not None)
        right = (tool.path for tool in tools if tuple(map(int, tool.version.split("."))) >= (12, 9))
        _assemblers.append(next(right, None))
    return _assemblers[0]


@contextmanager
def assembled(path: str) -> Iterator[str]:
    """Inside, triton assembles with the ptxas at `path`, and other kernels of the process with their own. Gives the
    options to compile with: the cache does not tell one ptxas from another, but options it does."""
    settings = importlib.import_module("triton").knobs.nvidia
    with _assembling:  # two threads at once would restore each other's
        own = {name: value for name, value in vars(settings).items() if name == "ptxas"}
        vars(settings)["ptxas"] = path
        try:
            yield f"{settings.ptxas_options or ''} --verbose".strip()
        finally:
            del vars(settings)["ptxas"]
            vars(settings).update(own)


def held() -> bool:
    """Whether launches are held back: only the shapes of results are wanted."""
    return bool(getattr(_local, "held", False))


def start(kernel: Any, programs: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch `kernel` over a grid, which may be empty."""
    if held() or not all(programs):
        return
    if interpreting():
        kernel[programs](*args, **options)
        return
    with assembled(assembler() or "") as ptx_options:
        kernel[programs](*args, ptx_options=ptx_options, **options)


# ---- launch choices ---------------------------------------------------------------------------------------------
CHOICES = Path(__file__).parent / "choices"
FAMILIES = {9: "hopper"}  # by the major compute capability; others run on the default choices


def family(device: torch.device) -> str:
    """The name of the GPU family, of a file in `choices`."""
    if device.type != "cuda":
        return "default"
    return FAMILIES.get(torch.cuda.get_device_capability(device)[0], "default")


@cache
def choices(family: str) -> dict[str, dict[str, dict[str, int]]]:
    """By kernel ("delta_rule.scan") and key, what a family launches with; kernels it lacks have the default's."""
    file = CHOICES / f"{family}.json"
    own = json.loads(file.read_text()) if file.exists() else {}
    return own if family == "default" else choices("default") | own


def choice(kernel: str, width: int, x: Tensor) -> dict[str, int]:
    """Fixed tile sizes, num_warps and num_stages of a kernel, never tuned behind the caller's back.

    Entries are keyed by the widest head that they serve, "128", or "128 fp32" where operands of 4 bytes want their own.
    """
    table = choices(family(x.device))[kernel]
    wide = operand_dtype(x.dtype) == torch.float32
    fitting = sorted((int(key.split()[0]), -len(key), key) for key in table if wide or "fp32" not in key)
    return table[next(key for size, _, key in fitting if size >= width)]


def record(family: str, kernel: str, key: str, values: dict[str, int]) -> None:
    """Keep a choice for a family."""
    file = CHOICES / f"{family}.json"
    table = json.loads(file.read_text()) if file.exists() else {}
    table.setdefault(kernel, {})[key] = values
    lines = (f' "{k}": {json.dumps(v)}' for k, v in sorted(table.items()))
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    choices.cache_clear()
