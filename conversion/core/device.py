"""Where a healing run computes, and how precisely."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from zoo.errors import ZooError


def make_accelerator(device: str | None) -> Accelerator:
    """bf16 autocast on a GPU, fp32 on a CPU."""
    if device not in (None, "cpu", "cuda"):
        raise ZooError(f"device was {device!r}; it must be cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ZooError("device was 'cuda'; torch finds no GPU: leave device out, or use cpu")
    cuda = torch.cuda.is_available() and device != "cpu"
    if PartialState._shared_state and (PartialState().device.type == "cuda") != cuda:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process was on another device
    return Accelerator(mixed_precision="bf16" if cuda else "no", cpu=not cuda)


@contextmanager
def fast_products(cuda: bool) -> Iterator[None]:
    """fp32 products in tf32 on a GPU, inside the `with` only."""
    before = torch.get_float32_matmul_precision()
    if cuda:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def device_name(device: torch.device) -> str:
    """What reports call a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
