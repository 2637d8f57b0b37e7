"""Quantised checkpoints, read as plain ones: a packed tensor is expanded when it is asked for, and kept by nobody.

MXFP4 (OCP Microscaling Formats 1.0; gpt-oss): `NAME_blocks [E, R, G, 16]`, two 4-bit floats a byte, the low one first,
and `NAME_scales [E, R, G]`, one power of two for 32 of them, make `NAME [E, 32 G, R]`.
FP8 (DeepSeek-V3, arXiv 2412.19437): `NAME [..., R, C]` in 8-bit floats times `NAME_scale_inv` or `NAME_scale`: one
factor for the tensor, or one for every block of `weight_block_size`. Scales of activations are left out: products are
computed in the expanded dtype.

E experts, R rows, C columns, G groups of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.architectures.core.checkpoint import TensorInfo

Infos = Mapping[str, "TensorInfo"]
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHT_SCALES, ACTIVATION_SCALES = ("_scale_inv", "_scale"), ("activation_scale", "input_scale")


@dataclass(frozen=True)
class Packed:
    """A tensor of `shape` and `dtype` that `expand` makes from the stored `sources`."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    expand: Callable[..., Tensor]


def packed(
    config: Mapping[str, Any], stored: Infos, dtype: torch.dtype
) -> tuple[dict[str, TensorInfo], dict[str, Packed]]:
    """The tensors of a checkpoint as a reader sees them, and how those that are packed are made, in `dtype`.

    Raises:
        ZooError: another quantisation than MXFP4 and FP8, or tensors that do not fit each other.
    """
    quantization = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not quantization:
        return dict(stored), {}
    method = quantization.get("quant_method")
    if method not in METHODS:
        raise ZooError(
            f"weights are quantised by {method!r}, which cannot be read; it must be one of {', '.join(METHODS)}, "
            "or a checkpoint that is not quantised"
        )
    made = METHODS[method](quantization, stored, dtype)
    seen, parts = {}, {source for each in made.values() for source in each.sources}
    for name, info in stored.items():
        target = name.removesuffix("_blocks") if method == "mxfp4" else name
        if target in made and made[target].sources[0] == name:
            seen[target] = replace(info, shape=made[target].shape, dtype=dtype)
        elif name not in parts and not (method == "fp8" and name.endswith(ACTIVATION_SCALES)):
            seen[name] = info
    return seen, made


def _mxfp4(quantization: Mapping[str, Any], stored: Infos, dtype: torch.dtype) -> dict[str, Packed]:
    made = {}
    for name, info in stored.items():
        if not name.endswith("_blocks"):
            continue
        target = name.removesuffix("_blocks")
        scales = stored.get(f"{target}_scales")
        if len(info.shape) != 4 or scales is None or scales.shape != info.shape[:-1] or info.shape[-1] != 16:
            found = None if scales is None else scales.shape
            raise ZooError(
                f"tensor {name!r} of shape {info.shape} has scales of shape {found}; MXFP4 has one for 16 bytes"
            )
        experts, rows, groups, _ = info.shape
        shape = (experts, 32 * groups, rows)
        made[target] = Packed((name, f"{target}_scales"), shape, dtype, partial(expand_mxfp4, dtype=dtype))
    return made


def expand_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`blocks [E, R, G, 16]`, `scales [E, R, G]` (both bytes) to `[E, 32 G, R]`, expert by expert."""
    table = torch.tensor(FP4, dtype=torch.float32, device=blocks.device)
    experts, rows, groups, _ = blocks.shape
    out = torch.empty(experts, rows, 32 * groups, dtype=dtype, device=blocks.device)
    for whole, block, scale in zip(out, blocks, scales, strict=True):
        values = table[torch.stack([block & 15, block >> 4], -1).int()].flatten(-2)
        whole.copy_(torch.ldexp(values, scale.int()[..., None] - 127).flatten(-2))
    return out.transpose(1, 2)


def _fp8(quantization: Mapping[str, Any], stored: Infos, dtype: torch.dtype) -> dict[str, Packed]:
    made = {}
    for name, info in stored.items():
        if info.dtype not in FLOAT8:
            continue
        scales = [f"{name}{suffix}" for suffix in WEIGHT_SCALES if f"{name}{suffix}" in stored]
        if len(scales) != 1:
            raise ZooError(
                f"tensor {name!r} in FP8 has {len(scales)} scales; it needs one, {name}_scale_inv or {name}_scale"
            )
        if not stored[scales[0]].dtype.is_floating_point:
            raise ZooError(f"scales {scales[0]!r} are {stored[scales[0]].dtype}; FP8 needs scales in floats")
        block = _block(name, info.shape, stored[scales[0]].shape, quantization.get("weight_block_size"))
        made[name] = Packed((name, scales[0]), info.shape, dtype, partial(expand_fp8, block=block, dtype=dtype))
    return made


def _block(name: str, shape: Sequence[int], grid: Sequence[int], given: Sequence[int] | None) -> tuple[int, int] | None:
    """Rows and columns that share a factor; None where there is one for the tensor."""
    if all(size == 1 for size in grid):
        return None
    if len(shape) >= 2 and len(grid) == len(shape) and tuple(grid[:-2]) == tuple(shape[:-2]):
        rows, columns = given or (-(-size // count) for size, count in zip(shape[-2:], grid[-2:], strict=True))
        if (-(-shape[-2] // rows), -(-shape[-1] // columns)) == tuple(grid[-2:]):
            return rows, columns
    raise ZooError(f"tensor {name!r} of shape {tuple(shape)} has scales of shape {tuple(grid)} for blocks of {given}")


def expand_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """`weight [..., R, C]` times its scales, computed in fp32, one row of blocks at a time."""
    if block is None:
        return (weight.float() * scale.float().reshape(())).to(dtype)
    rows, columns = block
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for index in range(scale.shape[-2]):
        part = slice(index * rows, (index + 1) * rows)
        factors = scale[..., index, :].float().repeat_interleave(columns, -1)[..., None, : weight.shape[-1]]
        out[..., part, :] = (weight[..., part, :].float() * factors).to(dtype)
    return out


METHODS: dict[str, Callable[[Mapping[str, Any], Infos, torch.dtype], dict[str, Packed]]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
}
