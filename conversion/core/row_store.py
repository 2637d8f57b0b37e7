"""Records of rows on disk, found again by the ids of the row, by any later run.

B rows, T tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[Any]
KEY = 16  # bytes


class RowStore:
    """Records of one size by row.

    Every writer has a pair of files: `*.rows`, records one after the other, and `*.keys`, a digest of each record's
    row. A record counts once its key is whole, so a run that is killed leaves nothing that is wrong.

    Args:
        folder: made when the first record is written.
        size: bytes of a record.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.places: dict[bytes, tuple[Path, int]] = {}
        self.own = folder / f"{time.time_ns()}-{os.getpid()}.rows"
        self.count = 0
        for keys in sorted(folder.glob("*.keys")):
            self._index(keys)

    def _index(self, keys: Path) -> None:
        rows, found = keys.with_suffix(".rows"), keys.read_bytes()
        for n in range(min(len(found) // KEY, rows.stat().st_size // self.size)):
            self.places[found[n * KEY : (n + 1) * KEY]] = (rows, n)

    def records(self, ids: Tensor, make: Callable[[Tensor], Array]) -> Array:
        """Records [B, size] of the rows `ids [B, T]`; `make` gives those of the rows that are not known."""
        keys = [blake2b(row.tobytes(), digest_size=KEY).digest() for row in ids.cpu().numpy().astype(np.int64)]
        missing = [n for n, key in enumerate(keys) if key not in self.places]
        if missing:
            self._add([keys[n] for n in missing], make(ids[torch.tensor(missing, device=ids.device)]))
        return np.stack([self._read(*self.places[key]) for key in keys])

    def _read(self, file: Path, place: int) -> Array:
        return np.fromfile(file, np.uint8, self.size, offset=place * self.size)

    def _add(self, keys: list[bytes], records: Array) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.own.open("ab") as rows:
            rows.write(np.ascontiguousarray(records).tobytes())
        with self.own.with_suffix(".keys").open("ab") as index:
            index.write(b"".join(keys))
        for key in keys:
            self.places[key] = (self.own, self.count)
            self.count += 1


def model_digest(model: nn.Module) -> str:
    """Changes with any weight of a model of ours, its dtypes, and how it computes."""
    digest = blake2b(repr(model.model.decoder_config).encode(), digest_size=8)  # type: ignore[union-attr]
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
