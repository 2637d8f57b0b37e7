"""These tests run the kernels in Triton's interpreter, which has to be chosen before triton is imported; test_triton
runs each file in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zoo.kernels import launch

sys.path.insert(0, str(Path(__file__).parent))  # packing and vector_cases, as ../conftest.py does for its folder
collect_ignore_glob = [] if launch.interpreting() else ["test_*.py"]


@pytest.fixture
def check_vector(evaluate: Callable[..., Any], assert_close: Callable[..., None]) -> Callable[..., None]:
    """Compares a call of an elementwise op with the reference in fp64, gradients too."""

    def run(call, tensors, rms=1e-5, **options):
        exact = {name: None if x is None else x.double() for name, x in tensors.items()}
        options = {"output_final_state": True} | options
        expected = evaluate(call, exact, backend="reference", **options)
        assert_close(evaluate(call, tensors, backend="triton", **options), expected, rms)

    return run
