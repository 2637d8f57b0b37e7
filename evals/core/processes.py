"""Work shared between the processes of one run (`accelerate launch -m zoo eval ...`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from zoo.errors import ZooError

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that accelerate or torchrun started this one among, if any; each takes a GPU of its own."""
    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo")  # only Python objects travel
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(items: Sequence[T]) -> list[T]:
    """Every n-th of `items`, this process's own."""
    return list(items[rank() :: world()])


def gathered(found: dict[str, Any]) -> dict[str, Any]:
    """The entries of all processes."""
    if world() == 1:
        return found
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


def from_main(work: Callable[[], T]) -> T:
    """Do `work` in the main process; all get what it returns, or the `ZooError` that it raises."""
    if world() == 1:
        return work()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = work()
        except ZooError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise ZooError(box[1])
    value: T = box[0]
    return value
