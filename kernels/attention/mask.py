"""Which keys a query sees.

Shapes: B batch, Tq queries, Tk keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = 1 << 30  # a key at this position or later is never seen


@dataclass(frozen=True)
class Mask:
    """The structure of a mask; the public docstring of `attention` defines each option."""

    causal: bool = True
    window: int | None = None
    sink_tokens: int = 0
    chunk: int | None = None
    stride: int | None = None
    dilation: int | None = None

    @property
    def local(self) -> bool:
        """Whether anything but causality restricts what is seen."""
        return not (self.window is None and self.chunk is None and self.dilation is None and self.stride is None)

    def visible(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """bool [..., Tq, Tk] from positions [..., Tq] and [..., Tk]."""
        pq, pk = q_positions[..., :, None], k_positions[..., None, :]
        seen = pk < PADDING
        if self.causal:
            seen = seen & (pk <= pq)
        if not self.local:
            return seen.expand(torch.broadcast_shapes(seen.shape, pq.shape))
        near = self._near(pq, pk)
        if self.sink_tokens:
            near = near | (pk < self.sink_tokens)
        if self.stride is not None:
            near = near | ((pq - pk) % self.stride == 0)
        return seen & near

    def _near(self, pq: Tensor, pk: Tensor) -> Tensor:
        distance = (pq - pk).abs()
        if self.window is None and self.chunk is None and self.dilation is None:
            return torch.zeros_like(distance, dtype=torch.bool)
        near = torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            near = near & (distance < self.window * (self.dilation or 1))
        if self.dilation is not None:
            near = near & (distance % self.dilation == 0)
        if self.chunk is not None:
            near = near & (pq.div(self.chunk, rounding_mode="floor") == pk.div(self.chunk, rounding_mode="floor"))
        return near


def positions(
    q: Tensor, k: Tensor, q_positions: Tensor | None, k_positions: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys with the defaults filled in, [T] or [B, T]; inside a packed batch they count from
    the start of each sequence."""
    keys = torch.arange(k.shape[1], device=k.device)
    if cu_seqlens is not None:
        keys = keys - cu_seqlens.long()[owners(cu_seqlens, k.shape[1])]
    queries = keys[k.shape[1] - q.shape[1] :] if q.shape[1] <= k.shape[1] else _behind(q, k)
    return queries if q_positions is None else q_positions, keys if k_positions is None else k_positions


def _behind(q: Tensor, k: Tensor) -> Tensor:
    return torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)


def owners(cu_seqlens: Tensor, length: int) -> Tensor:
    """[T] the packed sequence of each token."""
    token = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
