"""Reading a checkpoint directory: its config, and its tensors one at a time.

Shards are memory-mapped, so that a tensor costs anonymous memory only once something is computed from it.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.architectures.core import quantized
from zoo.errors import ZooError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFE_FILES = ("model.safetensors.index.json", "model.safetensors")
PICKLED_FILES = ("pytorch_model.bin.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """A directory with `config.json` and safetensors shards (one file, or several under an index).

    A `.bin` or `.pth` is read where there is nothing else, with `weights_only=True`.

    Args:
        path: the directory.

    Raises:
        ZooError: a missing or corrupt config, a truncated or foreign shard, an index that does not fit its shards.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = read_json(self.path / "config.json", "config")
        self._pickled: dict[Path, Mapping[str, Tensor]] = {}
        self._open: dict[Path, Any] = {}
        self._stored: dict[str, TensorInfo] = dict(self._scan())
        try:
            expanded = self._named_dtype or torch.bfloat16
            self.tensors, self._packed = quantized.packed(self.config, self._stored, expanded)
        except ZooError as error:
            raise ZooError(f"{self.path}: {error}") from None

    @property
    def dtype(self) -> torch.dtype:
        """That of the config, else that of the first floating-point tensor, as in transformers."""
        first = (info.dtype for info in self.tensors.values() if info.dtype.is_floating_point)
        return self._named_dtype or next(first, torch.float32)

    @property
    def _named_dtype(self) -> torch.dtype | None:
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        dtype = getattr(torch, named, None) if isinstance(named, str) else None
        return dtype if isinstance(dtype, torch.dtype) else None

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({info.file for info in self._stored.values()})

    def get(self, name: str) -> Tensor:
        """The tensor `name`, memory-mapped: clone before writing to it. An unknown name raises `ZooError`.

        One that is stored quantised is expanded anew by every call.
        """
        if name not in self.tensors:
            raise ZooError(f"{self.path} has no tensor {name!r}; it holds {len(self.tensors)} others")
        if name in self._packed:
            each = self._packed[name]
            return each.expand(*(self._read(source) for source in each.sources))
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        file = self._stored[name].file
        if file in self._pickled:
            return self._pickled[file][name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor

    def release(self) -> None:
        """Unmap the shards; a later `get` maps its shard again."""
        self._open.clear()

    def _scan(self) -> Iterator[tuple[str, TensorInfo]]:
        index, files = self._files()
        seen: dict[str, Path] = {}
        for file in files:
            for name, info in self._headers(file):
                if name in seen:
                    raise ZooError(f"tensor {name!r} is in both {seen[name]} and {file}; delete the stale shard")
                if index is not None and index.get(name) != file.name:
                    raise ZooError(f"{file} holds {name!r}, which the index puts in {index.get(name)}; rewrite it")
                seen[name] = file
                yield name, info
        if index is not None and (lost := sorted(set(index) - set(seen))):
            raise ZooError(f"{self.path / index[lost[0]]} lacks {lost[0]!r}, which the index puts in it; download it")

    def _files(self) -> tuple[dict[str, str] | None, list[Path]]:
        for name in (*SAFE_FILES, *PICKLED_FILES):
            file = self.path / name
            if file.is_file():
                return (None, [file]) if file.suffix != ".json" else self._indexed(file)
        for suffix in ("safetensors", "pth"):
            found = sorted(self.path.glob(f"*.{suffix}"))
            if len(found) == 1:
                return None, found
        raise ZooError(f"{self.path} has no weights; it must hold model.safetensors or model.safetensors.index.json")

    def _indexed(self, file: Path) -> tuple[dict[str, str], list[Path]]:
        index = read_json(file, "index").get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
            raise ZooError(f"index {file} has no weight_map from tensor to shard; download it again")
        files = [self.path / shard for shard in sorted(set(index.values()))]
        for shard in files:
            if not shard.is_file() or shard.parent != self.path:
                raise ZooError(f"index {file} names {shard.name}, which is not beside it; download the missing shard")
        return index, files

    def _headers(self, file: Path) -> Iterator[tuple[str, TensorInfo]]:
        if file.suffix != ".safetensors":
            self._pickled[file] = unpickle(file)
            for name, tensor in self._pickled[file].items():
                yield name, TensorInfo(file, tuple(tensor.shape), tensor.dtype)
            return
        for name, entry in safetensors_header(file).items():
            yield name, TensorInfo(file, tuple(entry["shape"]), _dtype(file, name, entry["dtype"]))


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; `what` names it in errors."""
    if not file.is_file():
        raise ZooError(f"{file.parent} has no {file.name}; it must be a checkpoint directory with a {what}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{what} {file} is not valid JSON ({_first_line(error)}); download it again") from None
    if not isinstance(data, dict):
        raise ZooError(f"{what} {file} holds a {type(data).__name__}, not a JSON object; download it again")
    return data


def safetensors_header(file: Path) -> dict[str, Any]:
    """Name -> dtype, shape and offsets, in file order, after checking that the file is whole."""
    try:
        with safe_open(file, framework="pt"):  # checks sizes and offsets against the file's length
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise ZooError(
            f"shard {file} is truncated or is not safetensors ({_first_line(error)}); download it again"
        ) from None
    header.pop("__metadata__", None)
    return header


def unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, read with `weights_only=True` alone: it can run no code."""
    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ZooError(
            f"shard {file} cannot be read as plain tensors ({_first_line(error)}); convert it to safetensors"
        ) from None
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise ZooError(f"shard {file} holds more than a mapping of tensors; convert it to safetensors")
    return data


def _dtype(file: Path, name: str, code: str) -> torch.dtype:
    if code not in DTYPES:
        raise ZooError(f"tensor {name!r} in {file} has dtype {code}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[code]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
