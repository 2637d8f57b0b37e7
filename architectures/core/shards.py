"""Writing a checkpoint directory: tensors in a known order, streamed to safetensors shards, all or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.architectures.core.checkpoint import DTYPES
from zoo.errors import ZooError

CODES = {dtype: code for code, dtype in DTYPES.items()}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def refuse_existing(out: Path) -> None:
    """Raise `ZooError` if something is at `out`: nothing is ever overwritten."""
    if os.path.lexists(out):
        raise ZooError(f"output {out} exists; choose another path or remove it")


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A new directory beside `out`, renamed to it at the end, and removed on any error, interrupt or SIGTERM.

    Raises:
        ZooError: `out` exists, or cannot be made.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out)
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    made = missing_parents(out)
    try:
        with sigterm_interrupts():
            make_directory(partial, out)
            yield partial
            refuse_existing(out)
            partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        remove_empty(made)
        raise


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to, renamed to it at the end, and removed on any error; `file` is replaced."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def make_directory(folder: Path, out: Path) -> None:
    """Make `folder` and its parents; `out` is what errors name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZooError(f"output {out} cannot be created: {error.strerror}; choose a writable path") from None


def missing_parents(path: Path) -> list[Path]:
    """Parents that are not there yet, the nearest first."""
    return [parent for parent in path.parents if not parent.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove each folder that is empty once those before it are gone."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(f"signal {number}")

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Finished(Protocol):
    """Names of files that are whole."""

    def __contains__(self, name: str) -> bool: ...

    def add(self, name: str) -> None:
        """`name` has just been written."""


def write_tensors(
    folder: Path,
    specs: Mapping[str, Spec],
    get: Callable[[str], Tensor],
    max_shard_size: int | str = "5GB",
    finished: Finished | None = None,
) -> None:
    """Write safetensors shards (and an index, if there are several), one tensor in memory at a time.

    Args:
        folder: where the shards go.
        specs: every tensor to write; shards follow this order.
        get: makes the tensor of a name; called once per tensor.
        max_shard_size: bytes, or text such as "500MB"; a larger tensor gets a shard of its own.
        finished: shards that an earlier run has written and that stay.

    Raises:
        ZooError: a tensor that is not of the planned shape and dtype.
    """
    groups = list(_group(specs, parse_size(max_shard_size)))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        shard = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        if finished is None or shard not in finished:
            _write_shard(folder / shard, {name: specs[name] for name in names}, get)
            if finished is not None:
                finished.add(shard)
        weight_map |= dict.fromkeys(names, shard)
    if len(groups) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _write_shard(file: Path, specs: Mapping[str, Spec], get: Callable[[str], Tensor]) -> None:
    # wide elements first: safetensors allows no padding, and a reader needs each tensor aligned to its element
    ordered = dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))
    with file.open("wb") as stream:
        stream.write(_header(ordered))
        for name, spec in ordered.items():
            tensor = get(name)
            if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
                found = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ZooError(f"tensor {name!r} is {found}; the plan says {spec.shape} {spec.dtype}")
            stream.write(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; no copy for a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data) if flat.numel() else memoryview(b"")


def write_json(file: Path, data: Any) -> None:
    """Indented JSON with a final newline, whole or not at all."""
    with atomic_file(file) as partial:
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_size(size: int | str) -> int:
    """Bytes from a number or from text such as "500MB" or "2GiB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise ZooError(f"shard size was {size!r}; it must be a number of bytes or text such as 500MB or 2GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _group(specs: Mapping[str, Spec], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, spec in specs.items():
        if names and size + spec.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += spec.nbytes
    yield names


def _header(specs: Mapping[str, Spec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, spec in specs.items():
        stop = start + spec.nbytes
        entries[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data to 8 bytes
    return struct.pack("<Q", len(text)) + text
