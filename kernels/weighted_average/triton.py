"""Exponentially weighted averages from the Triton kernel of `scan`."""

from typing import Any

from torch import Tensor

from zoo.kernels.scan.triton import OP
from zoo.kernels.sequential import State
from zoo.kernels.vector import supports as supports
from zoo.kernels.weighted_average.scans import average


def run(*args: Any) -> tuple[Tensor, State]:
    return average(OP, args)
