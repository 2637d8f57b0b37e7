"""How the Triton kernels of elementwise recurrences are launched: one program per tile of D, segment of T and sequence.

Few channels alone do not fill a device, so long sequences are cut into segments: a first pass finds what each segment
does to any state, the second starts every segment from what those before it did. Cuts depend on T and D only.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.kernels import launch
from zoo.kernels.checks import count_sequences

PROGRAMS = 512  # of one sequence, at most, because of segments
SEGMENT = 2048  # tokens, at least


def supports(x: Tensor, *rest: object) -> str | None:
    wide = x.dtype == torch.float64
    return "its kernels compute in fp32 and the inputs are fp64" if wide else launch.device_reason(x)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


class Cut(NamedTuple):
    options: dict[str, int]  # of the launch
    tiles: int
    segments: int
    sequences: int
    sizes: tuple[int, ...]


def cut(kernel: str, x: Tensor, cu_seqlens: Tensor | None, width: int = 1, channels: int = 0) -> Cut:
    """How work is divided by the fixed choices for `kernel`. Tiles divide groups of `channels`, where there are any."""
    chosen, (t, d) = launch.choice(kernel, width, x), x.shape[1:]
    tile, rows = min(chosen["BD"], 1 << (d - 1).bit_length()), chosen["BT"]
    while channels % tile:
        tile //= 2
    tiles = -(-d // tile)
    segment = max(1, -(-t // (max(1, min(PROGRAMS // tiles, t // SEGMENT)) * rows))) * rows
    segments, options = max(1, -(-t // segment)), {"D": d, "BD": tile, "PACKED": cu_seqlens is not None}
    return Cut(chosen | options, tiles, segments, count_sequences(x, cu_seqlens), (t, segment, segments, tiles))


def start(kernel: Any, cut: Cut, cu_seqlens: Tensor | None, sums: int, *tensors: Any, **flags: Any) -> None:
    """`sums` numbers for each channel say what a segment does to a state."""
    parts, split = cut.sequences * cut.segments, cut.segments > 1
    totals = tensors[0].new_empty(parts if split else 0, sums, cut.options["D"], dtype=torch.float32)
    for first in (True, False) if split else (False,):
        options = cut.options | flags | {"SUMMARY": first}
        launch.start(kernel, (cut.tiles * parts,), *tensors, totals, cu_seqlens, *cut.sizes, **options)
