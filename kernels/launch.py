"""What every Triton backend needs to know before it launches: where it can run, in which precision, on which chunks.

Shapes: B batch, T tokens, N sequences, C tokens per chunk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

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
    return None if major >= 8 else f"its products need compute capability 8.0 and {x.device} has {major}.{minor}"


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
