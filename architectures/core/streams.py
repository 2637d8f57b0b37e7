"""Attention to the first tokens of a sequence and to a window of its last ones.

B batch, T new tokens, S keys, G KV heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.cache import UNSEEN
from zoo.architectures.core.keys import Keys
from zoo.architectures.core.sparse import SparseArgs, View
from zoo.errors import ZooError


@dataclass(frozen=True, kw_only=True)
class StreamArgs(SparseArgs):
    """`budget` is the number of tokens kept, `sinks` of them the first ones; a budget of 1.0 keeps all."""

    budget: Any = 2048
    sinks: int = 4

    @property
    def window(self) -> int | None:
        """How many of the last tokens are seen, the query's own counted; None: all."""
        return None if self.everything else int(self.schedule.fixed or 0) - self.sinks

    def check_method(self) -> None:
        super().check_method()
        if not self.everything and self.schedule.fixed is None:
            raise ZooError(f"budget was {self.budget!r}; it must be a number of tokens, or 1.0 for all")
        if self.sinks < 0 or (self.window is not None and self.window < 1):
            raise ZooError(f"sinks was {self.sinks} of a budget of {self.budget}; it must be 0 or more, and leave some")


def attend_stream(view: View, window: int, sinks: int, blocks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`[B, 1, H, K]` and the log of the denominator `[B, 1, H]` of one query, reading what it sees alone; `blocks
    [B, G, 1, n]` of 128 keys are seen as well."""
    if blocks is None:
        blocks = torch.full((view.q.shape[0], view.k.shape[2], 1, 1), -1, dtype=torch.int32, device=view.q.device)
    return view.attend_lse(blocks, query_block=1, block=128, window=window, sink_tokens=sinks)


def keys_of(view: View) -> Keys:
    """The keys of a call, with positions where their order does not tell them."""
    if view.starts is None and view.q_positions is None:
        return Keys(view.k, view.v)
    return Keys(view.k, view.v, view.query_positions(), view.key_positions())


def first_keys(keys: Keys, count: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values `[B, count, G, K]` of the first tokens, and their positions, one that no query sees where
    there is none. Of packed sequences it is all keys, of which only the first ones can be seen."""
    k, v, _, at, _ = keys
    if cu_seqlens is not None:
        places = packed_positions(k.shape[1], cu_seqlens)
        return k, v, torch.where(places < count, places, UNSEEN)
    if at is None:
        return k[:, :count], v[:, :count], torch.arange(min(count, k.shape[1]), device=k.device)
    slots = torch.arange(count, device=k.device)[:, None]
    match = at.expand(k.shape[:2])[:, None] == slots  # [B, count, S]
    index = match.int().argmax(-1)[..., None, None]
    k, v = (x.gather(1, index.expand(-1, -1, *x.shape[2:])) for x in (k, v))
    return k, v, torch.where(match.any(-1), slots[:, 0], UNSEEN)


def packed_positions(tokens: int, cu_seqlens: Tensor) -> Tensor:
    """`[T]` from the start of each token's own sequence."""
    steps, ends = torch.arange(tokens, device=cu_seqlens.device), cu_seqlens.long()
    return steps - ends[torch.searchsorted(ends, steps, right=True) - 1]


def query_places(q: Tensor, keys: Keys, cu_seqlens: Tensor | None) -> Tensor:
    """`[1 or B, T]` positions of the queries."""
    if cu_seqlens is not None:
        return packed_positions(q.shape[1], cu_seqlens)[None]
    if keys.q_positions is not None:
        return torch.atleast_2d(keys.q_positions)
    return torch.arange(keys.k.shape[1] - q.shape[1], keys.k.shape[1], device=q.device)[None]
