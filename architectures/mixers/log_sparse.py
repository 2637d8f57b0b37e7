"""LogSparse attention (Li et al. 2019, arXiv 1907.00235): each token sees logarithmically many predecessors.

    A_t = {t, t - 1, t - 2, t - 4, t - 8, ...}

By choice also the `local` last tokens, and anew in every `restart` tokens.

B batch, T new tokens, S keys, H query heads, G KV heads, K head dimension, N distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.cache import UNSEEN
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.softmax import SoftmaxArgs, SoftmaxAttention, known_positions
from zoo.kernels.attention import attention

EXAMPLE = {"heads": 4, "head_dim": 16}
VARIANTS = {
    "local": {**EXAMPLE, "local": 3, "kv_heads": 2, "rope": "default"},
    "restart": {**EXAMPLE, "restart": 6},
}


@dataclass(frozen=True, kw_only=True)
class Args(SoftmaxArgs):
    """`local` keys, the own one counted, are seen whatever their distance; no key from before the last multiple of
    `restart` is seen, so that the cache is bounded (None: all the text is one)."""

    local: int = 1
    restart: int | None = None

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(local=self.local, restart=self.restart)


class LogSparseAttention(SoftmaxAttention):
    options = Args
    bidirectional = False

    @property
    def recent(self) -> int | None:
        return None if self.args.restart is None else self.args.restart - 1

    def distances(self, length: int, device: torch.device) -> Tensor:
        """How far back the keys of one query lie, in a text of `length` tokens: numbers below `local` and powers of
        two. They are made on the device, so that nothing waits for it."""
        most = min(length, self.args.restart or length)
        near = min(self.args.local, most)
        least = max(near - 1, 0).bit_length()  # of the first power beyond those
        powers = 2 ** torch.arange(least, max(least, (most - 1).bit_length()), device=device)
        return torch.cat([torch.arange(near, device=device), powers])

    def attend(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        """Every query with the N keys that it sees, gathered: O(T log S)."""
        (b, t), s = q.shape[:2], keys.k.shape[1]
        queries, positions = (torch.atleast_2d(x) for x in known_positions(q, keys, ctx))
        distances = self.distances(s, q.device)
        wanted = queries[..., None] - distances  # [B or 1, T, N]
        if keys.k_positions is None:
            slots = torch.arange(s - t, s, device=q.device)[:, None] - distances
            slots, seen = slots.clamp(min=0).expand(wanted.shape), wanted >= 0
        else:
            slots = find_slots(positions, wanted)
            seen = positions[:, None].expand(-1, t, -1).gather(2, slots) == wanted
        if self.args.restart is not None:
            seen = seen & (wanted // self.args.restart == queries[..., None] // self.args.restart)
        k, v = (pick(x, slots.expand(b, -1, -1)) for x in (keys.k, keys.v))
        visible = torch.where(seen, 0, UNSEEN).expand(b, -1, -1).flatten(0, 1)
        call: dict[str, Any] = self.call(Keys(k, v, visible.new_zeros(b * t, 1), visible), ctx) | {"cu_seqlens": None}
        o: Tensor = attention(q.flatten(0, 1)[:, None], k, v, **call)
        return o.view(q.shape)


def find_slots(positions: Tensor, wanted: Tensor) -> Tensor:
    """`[B, T, N]`: where among the keys `positions [B, S]` each of `wanted [B, T, N]` is, if it is there at all.

    Keys are held for at most S positions in a row, so that a position modulo S tells them apart.
    """
    b, s = positions.shape
    places = torch.where(positions < UNSEEN, positions % s, s)
    table = positions.new_zeros(b, s + 1)
    table.scatter_(1, places, torch.arange(s, device=positions.device).expand(b, -1))
    return table.gather(1, (wanted % s).flatten(1)).view(wanted.shape)


def pick(x: Tensor, slots: Tensor) -> Tensor:
    """The keys `x [B, S, G, K]` in `slots [B, T, N]`, as `[B T, N, G, K]`."""
    index = slots.flatten(1)[..., None].expand(-1, -1, x.shape[2] * x.shape[3])
    return x.flatten(2).gather(1, index).view(-1, slots.shape[2], *x.shape[2:])


MODULE = LogSparseAttention
