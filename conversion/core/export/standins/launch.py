"""Triton kernels stay in hybrid-zoo: here every op runs in plain torch, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def device_reason(*tensors: Any) -> str:
    """Why no kernel of ours runs."""
    return "this file has no Triton kernels; hybrid-zoo has them"


@contextmanager
def held_back() -> Iterator[None]:
    """Nothing is ever launched."""
    yield


def held() -> bool:
    """Whether launches are held back."""
    return False
