"""The teacher's likeliest tokens on disk, in place of its logits: k tokens of each place and the mass of all others.

B rows, T tokens, D hidden size, V vocabulary, k tokens of each place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo.conversion.core.row_store import Array, RowStore

LEAST = -30.0  # log of a mass that is none: minus infinity would make the loss nan


def log_rest(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability `[...]` of all but `tokens [..., k]`, from those of every token `[..., V]`."""
    return log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)


def likeliest(log_p: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest tokens `[..., k]`, their log-probabilities, and that of all others together `[...]`."""
    known, tokens = log_p.topk(k, dim=-1)
    return tokens, known, log_rest(log_p, tokens).clamp(min=LEAST)


class Likeliest:
    """What a teacher says of rows, kept in a directory: 6 bytes per known token (32-bit id, fp16) and 2 for the rest.

    Args:
        folder: of this teacher. length: tokens per row, T. k: tokens of each place.
        chunk: tokens whose logits are held at once while it is filled.
    """

    def __init__(self, folder: Path, length: int, k: int, chunk: int = 8192) -> None:
        self.length, self.k, self.chunk = length, k, chunk
        self.store = RowStore(folder / f"top{k}-{length}", length * (6 * k + 2))

    def of(
        self, ids: Tensor, hidden: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[B, T, k]`, log-probabilities `[B, T, k]` and those of the rest `[B, T]`; rows not yet known are
        computed by `hidden` (`ids` to `[B, T, D]`) and `head` (`[C, D]` to logits) first."""

        def make(missing: Tensor) -> Array:
            parts = [
                likeliest(torch.log_softmax(head(part).float(), dim=-1), self.k)
                for part in hidden(missing).flatten(0, 1).split(self.chunk)
            ]
            return self.packed(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

        return self.unpacked(self.store.records(ids, make), ids.device)

    def packed(self, tokens: Tensor, log_p: Tensor, rest: Tensor) -> Array:
        """Records [B, bytes] of tensors [B * T, ...]."""
        arrays = (tokens.to(torch.int32), log_p.half(), rest.half())
        flat = [tensor.cpu().numpy().reshape(-1, self.length * (tensor[0].numel())) for tensor in arrays]
        return np.concatenate([np.ascontiguousarray(array).view(np.uint8) for array in flat], axis=1)

    def unpacked(self, records: Array, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        places = self.length * self.k
        ends = np.cumsum([4 * places, 2 * places])
        tokens, log_p, rest = (np.ascontiguousarray(part) for part in np.split(records, ends, axis=1))
        shape = (len(records), self.length)
        return (
            torch.from_numpy(tokens.view(np.int32)).to(device).long().view(*shape, self.k),
            torch.from_numpy(log_p.view(np.float16)).to(device).float().view(*shape, self.k),
            torch.from_numpy(rest.view(np.float16)).to(device).float().view(shape),
        )
