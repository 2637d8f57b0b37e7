"""One call of attention, and which keys a query sees in it.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K and V head widths.
"""

import operator
from dataclasses import dataclass
from functools import reduce

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
        return (self.window, self.chunk, self.stride, self.dilation) != (None,) * 4

    def visible(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """bool [..., Tq, Tk] from positions [..., Tq] and [..., Tk]."""
        pq, pk = q_positions[..., :, None], k_positions[..., None, :]
        apart = pq - pk
        seen = (pk < PADDING) & (apart >= 0 if self.causal else apart == apart)
        near = [] if self.window is None else [apart.abs() < self.window * (self.dilation or 1)]
        near += [] if self.dilation is None else [apart % self.dilation == 0]
        near += [] if self.chunk is None else [pq // self.chunk == pk // self.chunk]
        kinds = [reduce(operator.and_, near)] if near else []
        kinds += [] if self.stride is None else [apart % self.stride == 0]
        return seen & reduce(operator.or_, [*kinds, pk < self.sink_tokens]) if kinds else seen


@dataclass(frozen=True)
class Call:
    """The validated arguments of `attention`, the one argument of its backends."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    sink_logits: Tensor | None
    q_positions: Tensor | None
    k_positions: Tensor | None
    softcap: float | None
    scale: float
    return_lse: bool
    cu_seqlens: Tensor | None

    @property
    def default(self) -> bool:
        """Whether keys lie at 0 .. Tk - 1 and queries at the last of these."""
        return self.q_positions is None and self.k_positions is None and self.cu_seqlens is None

    @property
    def sdpa(self) -> bool:
        """Whether torch's own attention runs the call without a mask tensor."""
        tq, tk, mask = self.q.shape[1], self.k.shape[1], self.mask
        wide = Mask(mask.causal, mask.window, mask.sink_tokens) == mask and tq <= tk <= (mask.window or 0)
        free = self.default and (wide or not mask.local) and (not mask.causal or tq in (1, tk))
        return free and self.sink_logits is None and self.softcap is None and not self.return_lse

    def positions(self) -> tuple[Tensor, Tensor]:
        """Of queries and keys with the defaults filled in, [T] or [B, T]; inside a packed batch they count from the
        start of each sequence."""
        tq, tk = self.q.shape[1], self.k.shape[1]
        queries, keys = torch.arange(tk - tq, tk, device=self.k.device), torch.arange(tk, device=self.k.device)
        if self.cu_seqlens is not None:
            queries = keys = keys - self.cu_seqlens.long()[self._owners()]
        queries = queries if self.q_positions is None else self.q_positions
        return queries, keys if self.k_positions is None else self.k_positions

    def near(self, begin: int, end: int) -> slice | Tensor:
        """The keys that queries begin .. end - 1 may see, or more."""
        mask, tq, tk = self.mask, self.q.shape[1], self.k.shape[1]
        if not self.default or mask.stride is not None:
            return slice(0, tk)
        far = tq + tk
        reach = min(mask.chunk or far, (mask.window or far) * (mask.dilation or 1))
        low = min(max(tk - tq + begin - reach + 1, 0), tk - 1)
        high = max(min(tk - tq + end + (0 if mask.causal else reach - 1), tk), low + 1)
        sinks = torch.arange(min(mask.sink_tokens, low), device=self.k.device)
        return torch.cat([sinks, torch.arange(low, high, device=sinks.device)]) if len(sinks) else slice(low, high)

    def visible(self, queries: slice, keys: slice | Tensor) -> Tensor:
        """bool [B or 1, queries, keys] for some of them."""
        pq, pk = (torch.atleast_2d(x) for x in self.positions())
        seen = self.mask.visible(pq[:, queries], pk[:, keys])
        if self.cu_seqlens is None:
            return seen
        owners = self._owners()
        return seen & (owners[queries, None] == owners[keys])

    def _owners(self) -> Tensor:
        """[T] the packed sequence of each token."""
        assert self.cu_seqlens is not None
        token = torch.arange(self.k.shape[1], device=self.k.device)
        return torch.searchsorted(self.cu_seqlens.long(), token, right=True) - 1
