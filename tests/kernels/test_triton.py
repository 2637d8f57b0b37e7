"""The Triton backends without a device: their tests in Triton's interpreter, and what they refuse."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calls import good

from zoo.kernels import dispatch, launch

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
OPS = [op for op in dispatch.ops() if "triton" in dispatch.backends(op)]

pytestmark = pytest.mark.skipif(launch.interpreting(), reason="this process is the interpreter's")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def supported(op: str) -> tuple[Any, Callable[..., Any], dict[str, Any]]:
    """The package, the function and arguments that its Triton backend would take on a device."""
    package, run, arguments = good(op)
    arguments.pop("value_decay", None)  # linear attention's kernels take it by itself
    return package, run, arguments


def test_every_op_with_a_triton_backend_has_a_file():
    assert {f"test_{op}" for op in OPS} <= {file.stem for file in FILES}


@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_kernels_in_the_interpreter(root, file, which):
    """The interpreter has to be chosen before triton is imported, hence the process."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    none = pytest.ExitCode.NO_TESTS_COLLECTED if which == "slow" else pytest.ExitCode.OK
    assert done.returncode in (pytest.ExitCode.OK, none), done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_cpu_is_refused(op):
    _, run, arguments = supported(op)
    with pytest.raises(ValueError, match="CUDA device"):
        run(**arguments, backend="triton")


@pytest.mark.parametrize("op", OPS)
def test_without_triton_its_backends_say_so_and_others_run(monkeypatch, op):
    package, run, arguments = supported(op)
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "triton", None)  # as if it were not installed
        backends = dispatch.load(package.__name__)
    monkeypatch.setattr(package, "BACKENDS", backends)
    with pytest.raises(ValueError, match="triton is not installed"):
        run(**arguments, backend="triton")
    run(**arguments)
