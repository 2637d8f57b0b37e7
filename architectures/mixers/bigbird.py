"""BigBird: a window, random blocks and global blocks (Zaheer et al. 2020, arXiv 2007.14062; internal global tokens).

A text is cut in blocks of `block` tokens. Query block i reads

    blocks i - w .. i + w, 2 w + 1 = `window`,   `random` others,   and the `global_blocks` first and last blocks

in one softmax; the first and last blocks read everything. Which blocks are random depends on `seed` (one per layer),
on the head, and on i and the number of blocks of the text. Every token sees both sides: it is for encoders.

B batch, T tokens, H query heads, G KV heads, K head dimension, N blocks, S listed blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.buckets import back, both_sides
from zoo.architectures.core.choosing import lengths
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.softmax import SoftmaxArgs, SoftmaxAttention
from zoo.architectures.core.sparse import View
from zoo.errors import ZooError
from zoo.kernels.attention import PADDING, attention

EXAMPLE = {"heads": 4, "head_dim": 16, "block": 1, "window": 3, "random": 2}
VARIANTS = {"blocks": {**EXAMPLE, "block": 16, "kv_heads": 2, "rope": "default", "random": 1}}
EVEN = 0x45D9F3B  # an odd number whose products spread bits evenly


@dataclass(frozen=True, kw_only=True)
class Args(SoftmaxArgs):
    """`block` is 1 or 16 to 128 tokens; `window`, `random` and `global_blocks` count blocks."""

    block: int = 64
    window: int = 3
    random: int = 3
    global_blocks: int = 1
    seed: int = 0

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(window=self.window, global_blocks=self.global_blocks)
        if self.block != 1 and not 16 <= self.block <= 128:
            raise ZooError(f"block was {self.block}; it must be 1 or 16 to 128")
        if not self.window % 2:
            raise ZooError(f"window was {self.window}; it must be odd, as it reaches as far on both sides")
        if self.random < 0:
            raise ZooError(f"random was {self.random}; it must be at least 0")
        if self.softcap is not None:
            raise ZooError(f"softcap was {self.softcap}; attention over chosen keys has none")


class BigBird(SoftmaxAttention):
    options = Args
    encoder_only = True
    packed = False

    def attend(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        view, order = both_sides(q, keys.k, keys.v, ctx, self.args.scale)
        size = self.args.block
        o = view.attend(self.lists(view), query_block=size, block=size, causal=False)
        return back(self.with_global(view, o), order)

    @torch.no_grad()
    def lists(self, view: View) -> Tensor:
        """`[B, H, N, S]`, int32; entries below 0 or beyond the text name no block."""
        a, b, device = self.args, view.q.shape[0], view.q.device
        number = torch.arange(-(-view.q.shape[1] // a.block), device=device)
        count = -(-lengths(view) // a.block)[:, None, None, None]  # [B, 1, 1, 1]
        near = number[:, None] + torch.arange(-(a.window // 2), a.window // 2 + 1, device=device)
        ends = torch.arange(a.global_blocks, device=device)
        fixed = [near[None, None], ends[None, None, None], count - 1 - ends]
        found = [x.expand(b, self.heads, len(number), -1) for x in fixed] + self.random_blocks(number, count)
        return torch.cat(found, -1).int()

    def random_blocks(self, number: Tensor, count: Tensor) -> list[Tensor]:
        """`[B, H, N, R]` blocks of `count [B, 1, 1, 1]` neither near nor global, -1 where there are no more."""
        a = self.args
        if not a.random:
            return []
        own, other = number[:, None], number[None, :]
        free = ((own - other).abs() > a.window // 2) & (other >= a.global_blocks) & (other < count - a.global_blocks)
        drawn = scattered(a.seed, torch.arange(self.heads, device=number.device)[:, None, None], own, other)
        drawn = drawn.masked_fill(~free, -1)
        best, blocks = drawn.topk(min(a.random, len(number)))
        return [blocks.masked_fill(best < 0, -1)]

    def with_global(self, view: View, o: Tensor) -> Tensor:
        """`o [B, T, H, K]`, with that of the first and last blocks' queries over all keys."""
        width, place = self.args.global_blocks * self.args.block, view.query_positions().expand(o.shape[:2])
        last = -(-lengths(view) // self.args.block)[:, None] * self.args.block - width  # [B, 1]
        begin = 0 if view.starts is None else view.starts[:, None]
        steps = torch.arange(width, device=o.device)
        slots = (begin + torch.cat([steps.expand(o.shape[0], -1), last.clamp(min=0) + steps], 1)).clamp(
            max=o.shape[1] - 1
        )
        keys: dict[str, Any] = {}
        if view.starts is not None:
            keys = {"k_positions": torch.where(place < 0, PADDING, place)}
        q = view.q.take_along_dim(slots[..., None, None], 1)
        seeing_all = attention(q, view.k, view.v, causal=False, scale=view.scale, **keys)
        index = torch.where(place < width, place, width + place - last.clamp(min=0)).clamp(0, 2 * width - 1)
        ends = (place < width) | (place >= last)
        return torch.where(ends[..., None, None], seeing_all.take_along_dim(index[..., None, None], 1), o)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return 0


def scattered(seed: int, *numbers: Tensor) -> Tensor:
    """Integers of 32 bits that look random, by `seed` and numbers alone: the same on every device."""
    found = torch.tensor(seed & 0xFFFF, device=numbers[0].device)
    for number in numbers:
        found = found * 31 + number + 1
        for _ in range(2):
            found = ((found ^ (found >> 16)) * EVEN) & 0xFFFFFFFF
    return found ^ (found >> 16)


MODULE = BigBird
