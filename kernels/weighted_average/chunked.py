"""Exponentially weighted averages from `scan` in chunks."""

from typing import Any

from torch import Tensor

from zoo.kernels.scan.chunked import scan
from zoo.kernels.sequential import State
from zoo.kernels.weighted_average.scans import average


def run(*args: Any) -> tuple[Tensor, State]:
    return average(scan, args)
