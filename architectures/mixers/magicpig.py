"""MagicPIG: decode samples keys by hashing and weighs them by how likely that was (Chen et al. 2024, arXiv 2410.16179).

    p_j = 1 - arccos(cos(q, k_j - mu)) / pi            a bit of two codes agrees; mu a mean of keys
    u_j = 1 - (1 - p_j^P)^L - L p_j^P (1 - p_j^P)^(L-1)   codes of P bits agree in two of L tables or more
    o   = sum of softmax(s_j - log u_j) v_j               over the keys that do; u_j = 1 for sinks and the window

so that numerator and denominator are those of attention in expectation over the planes that `seed` draws. Keys are
centred, which changes no softmax, on the mean of the `window` tokens after the sinks. Sink tokens and the window are
always read. Of more keys than `budget`, those that agree in most tables are read, and what is left out is missed.
Prefill is dense.

B batch, S keys, H query heads, G KV heads, M query heads of each, K head dimension, L tables, C sampled keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.choosing import chooses, follows, lengths, widened
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.lsh import MOST_BITS, agreements, collision, draw, sign_codes
from zoo.architectures.core.mixer import wide
from zoo.architectures.core.sparse import Method, SparseArgs, SparseAttention, View
from zoo.errors import ZooError

ROOM = 64  # tokens by which the notes grow
EXAMPLE = {
    **{"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"},
    **{"bits": 4, "tables": 8, "window": 16, "budget": 1.0},
}
VARIANTS = {"small": {**EXAMPLE, "budget": 32}}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`bits` is P, `tables` L. `window` counts the own token; `budget` is the most keys that are sampled beside it and
    the first `sinks` ones."""

    bits: int = 10
    tables: int = 150
    window: int = 64
    sinks: int = 4
    seed: int = 0

    def check_method(self) -> None:
        check_sizes(bits=self.bits, window=self.window)
        if self.bits > MOST_BITS:
            raise ZooError(f"bits was {self.bits}; it must be at most {MOST_BITS}")
        if self.tables < 2:
            raise ZooError(f"tables was {self.tables}; it must be at least 2, as a sampled key agrees in two")
        if self.sinks < 0:
            raise ZooError(f"sinks was {self.sinks}; it must be at least 0")
        super().check_method()
        if self.schedule.mass is not None:
            raise ZooError("budget had mass; a sample has no mass to reach, so give tokens or a fraction")


class MagicPIG(Method):
    phases = ("decode",)
    name = "magicpig"

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self._planes: dict[torch.device, Tensor] = {}

    def observe(self, view: View) -> None:
        if view.notes is not None and not self.args.everything:
            self.codes(view)

    def decode(self, view: View) -> Tensor:
        if self.args.everything:
            return view.dense()
        blocks, counts, bias = self.sample(view)
        static = dict(window=self.args.window, sink_tokens=self.args.sinks)
        return view.attend(blocks, counts, query_block=1, block=1, bias=bias, **static)

    @chooses
    def sample(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled tokens, how many, and -log u of each: `[B, H, 1, C]`, `[B, H, 1]` and `[B, H, 1, C]`."""
        (b, _, h, width), (_, s, g, _) = view.q.shape, view.k.shape
        own = sign_codes(view.q, self.planes(view.q)).unflatten(2, (g, -1))[:, 0]
        often = agreements(self.codes(view)[:, :s], own).flatten(1, 2)  # [B, H, S]
        length, place = lengths(view)[:, None, None], torch.arange(s, device=often.device)
        place = place if view.starts is None else place - view.starts[:, None, None]
        sampled = (often > 1) & (place >= self.args.sinks) & (place < length - self.args.window)
        often, slots = often.masked_fill(~sampled, 0).topk(self.args.schedule.width(s))
        most = self.args.schedule.counts(length[:, :, 0].expand(b, h), often[..., :1])
        counts = torch.minimum((often > 0).sum(-1), most)
        k = wide(view.k).gather(1, slots.view(b, g, -1).transpose(1, 2)[..., None].expand(-1, -1, -1, width))
        k = (k - self.centre(view)).unflatten(1, (h // g, -1)).movedim(3, 1).flatten(1, 2)  # [B, H, C, K]
        cosine = F.cosine_similarity(wide(view.q[:, 0])[:, :, None], k, dim=-1)
        bias = -collision(cosine, self.args.bits, self.args.tables).clamp(min=1e-12).log()
        slots = slots if view.starts is None else slots - view.starts[:, None, None]
        return slots.int()[:, :, None], counts.int()[:, :, None], bias.to(k.dtype)[:, :, None]

    def planes(self, like: Tensor) -> Tensor:
        """`[L, P, K]`"""
        if like.device not in self._planes:
            drawn = draw((self.args.tables, self.args.bits, like.shape[-1]), self.args.seed)
            self._planes[like.device] = drawn.to(like.device)
        return self._planes[like.device]

    def centre(self, view: View) -> Tensor:
        """mu `[B, 1, G, K]`; it means something once a key lies before the window, which then has no part in it."""
        slots = torch.arange(self.args.sinks, self.args.sinks + self.args.window, device=view.k.device)
        slots = slots[None] if view.starts is None else slots + view.starts[:, None]
        slots = slots.clamp(max=view.k.shape[1] - 1)[..., None, None]
        return wide(view.k.take_along_dim(slots, 1)).mean(1, keepdim=True)

    @chooses
    def codes(self, view: View) -> Tensor:
        """Codes of the keys before the window `[B, S or more, G, L]`, from the notes where these follow the cache."""
        tokens, keys = view.q.shape[1], view.k.shape[1]
        notes: dict[str, Any] = {} if view.notes is None else view.notes
        codes = notes.get("codes")
        if codes is None or not follows(view, notes["seen"], codes):
            codes = widened(sign_codes(wide(view.k) - self.centre(view), self.planes(view.k)), rounded(keys))
        else:  # the keys that have just left the window
            codes, last = widened(codes, rounded(keys)), lengths(view)[:, None] - self.args.window
            slots = last - 1 - torch.arange(tokens, device=codes.device)
            slots = slots.clamp(min=0) if view.starts is None else slots.clamp(min=0) + view.starts[:, None]
            new = wide(view.k.take_along_dim(slots[..., None, None], 1)) - self.centre(view)
            index = slots[..., None, None].expand(-1, -1, *codes.shape[2:])
            codes.scatter_(1, index, sign_codes(new, self.planes(new)))
        notes["codes"], notes["seen"] = codes, keys
        return codes


def rounded(length: int) -> int:
    """Tokens that the notes about `length` keys have room for."""
    return -(-length // ROOM) * ROOM


class MagicPIGAttention(SparseAttention):
    options = Args
    method = MagicPIG

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        codes = 0 if self.args.everything else rounded(length) * self.kv_heads * self.args.tables
        return super().state_bytes(length, itemsize) + codes * torch.int16.itemsize


MODULE = MagicPIGAttention
