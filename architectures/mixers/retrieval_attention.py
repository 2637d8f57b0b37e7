"""RetrievalAttention: decode reads the keys that an index finds for the query (Liu et al. 2024, arXiv 2409.10516).

    index     of every `stride`-th query of the prompt, the `neighbours` keys of the largest q . k
    search    the samples nearest to a query (largest inner product) -> their keys -> the keys of the largest q . k
    attention one softmax over what is found, the sink tokens and the window

Queries are not distributed as keys are, so that an index of keys among keys finds the wrong ones. The paper links keys
that are near to the same query of the prompt and walks that graph; here the queries themselves lead to their keys, in
one step without a walk. Keys that leave the window enter the lists, each with the exact rank it has there. `budget`
counts the retrieved keys alone. Prefill is dense. Without prompt queries (no cache, beams reordered, tokens removed)
all keys are scored.

B batch, S keys, H query heads, G KV heads, K head dimension, N samples, L neighbours, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.choosing import chooses, follows, lengths, slices
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import wide
from zoo.architectures.core.sparse import Method, SparseArgs, SparseAttention, View
from zoo.errors import ZooError

EXAMPLE = {
    **{"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"},
    **{"stride": 16, "neighbours": 8, "probes": 2, "window": 4, "sinks": 2, "budget": 1.0},
}
VARIANTS = {"small": {**EXAMPLE, "budget": 32}}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`stride` prompt tokens give one sample, which lists `neighbours` keys; a query looks into `probes` lists. The
    first `sinks` tokens and the last `window` ones, the own one counted, are always read, and up to `window` more."""

    stride: int = 64
    neighbours: int = 128
    probes: int = 16
    window: int = 256
    sinks: int = 128

    def check_method(self) -> None:
        check_sizes(stride=self.stride, neighbours=self.neighbours, probes=self.probes, window=self.window)
        if self.sinks < 0:
            raise ZooError(f"sinks was {self.sinks}; it must be at least 0")
        super().check_method()


class RetrievalAttention(Method):
    phases = ("decode",)
    name = "retrieval_attention"

    @chooses
    def observe(self, view: View) -> None:
        """Bring the lists up to date with a prompt and sample its queries."""
        if view.notes is None or self.args.everything:
            return
        notes = self.followed(view)
        sampled = view.q.flip(1)[:, :: self.args.stride].transpose(1, 2)  # [B, H, N, K], from the last one back
        real = view.query_positions().expand(view.q.shape[:2]).flip(1)[:, :: self.args.stride] >= 0
        new = {"queries": sampled.contiguous(), "real": real, **self._nothing(sampled)}
        self._enter(view, new, torch.zeros_like(lengths(view)), view.k.shape[1])
        for name, dim in (("queries", 2), ("real", 1), ("scores", 2), ("lists", 2)):
            notes[name] = torch.cat([notes[name], new[name]], dim) if name in notes else new[name]

    def decode(self, view: View) -> Tensor:
        s, budget = view.k.shape[1], self.args.schedule
        notes = {} if self.args.everything else self.followed(view)
        if self.args.everything or (budget.mass is None and budget.width(s) >= s):
            return view.dense()
        static = dict(window=2 * self.args.window, sink_tokens=self.args.sinks)
        return view.attend(*self.retrieve(view, notes), query_block=1, block=1, **static)

    @chooses
    def retrieve(self, view: View, notes: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Tokens `[B, H, 1, C]`, best first, and how many, `[B, H, 1]`."""
        (b, _, h, _), s = view.q.shape, view.k.shape[1]
        length, places = lengths(view), self._candidates(view, notes)
        if places is None:
            places = torch.arange(s, device=view.k.device).expand(b, h, -1)
        last = self._boundary(length)[:, None, None]
        known = (places >= self.args.sinks) & (places < last)
        if "queries" in notes:  # several lists may name a key
            places = places.masked_fill(~known, s).sort(-1).values
            known = (places < s) & (places != F.pad(places, (1, 0), value=-1)[..., :-1])
        scores = self._scores(view, places.masked_fill(~known, 0)).masked_fill(~known, -torch.inf)
        scores, order = scores.sort(-1, descending=True)
        counts = self.args.schedule.counts(length[:, None].expand(b, h), scores.softmax(-1).nan_to_num())
        counts = torch.minimum(counts, known.sum(-1))
        most = min(max(1, self.args.schedule.width(s)), order.shape[-1])
        found = places.gather(-1, order[..., :most])
        return found.int()[:, :, None], counts.int()[:, :, None]

    def _candidates(self, view: View, notes: dict[str, Any]) -> Tensor | None:
        """Keys `[B, H, C]` in the lists of the samples nearest to the query, S where there is none."""
        if "queries" not in notes:
            return None
        near = torch.einsum("bhk,bhnk->bhn", wide(view.q[:, 0]), wide(notes["queries"]))
        near = near.masked_fill(~notes["real"][:, None], -torch.inf)
        probed = near.topk(min(self.args.probes, near.shape[-1])).indices[..., None]
        lists = notes["lists"].take_along_dim(probed, 2)
        unlisted = notes["scores"].take_along_dim(probed, 2) == -torch.inf
        return lists.long().masked_fill(unlisted, view.k.shape[1]).flatten(2)

    def _scores(self, view: View, places: Tensor) -> Tensor:
        """The query's scores `[B, H, C]` of the keys at `places`."""
        (b, _, h, width), g = view.q.shape, view.k.shape[2]
        slots = places if view.starts is None else places + view.starts[:, None, None]
        index = slots.clamp(max=view.k.shape[1] - 1).view(b, g, -1).transpose(1, 2)[..., None].expand(-1, -1, -1, width)
        k = view.k.gather(1, index).unflatten(1, (h // g, -1)).movedim(3, 1).flatten(1, 2)
        scale = width**-0.5 if view.scale is None else view.scale
        return scale * torch.einsum("bhk,bhck->bhc", wide(view.q[:, 0]), wide(k))

    def _boundary(self, length: Tensor) -> Tensor:
        """Keys before it are listed; it moves by a window at a time, so that entering them seldom costs anything."""
        return ((length - self.args.window) // self.args.window).clamp(min=0) * self.args.window

    @chooses
    def followed(self, view: View) -> dict[str, Any]:
        """The notes, with the keys of this call in the lists; without samples where tokens were missed."""
        notes: dict[str, Any] = {} if view.notes is None else view.notes
        tokens, keys = view.q.shape[1], view.k.shape[1]
        if "queries" in notes and not follows(view, notes["seen"], notes["scores"]):
            notes.clear()
        window = self.args.window
        alone = view.q_positions is None and view.starts is None  # elsewhere only the device knows the lengths
        if "queries" in notes and not (alone and keys // window == (keys - tokens) // window):
            before = self._boundary(lengths(view) - tokens)
            self._enter(view, notes, before, min(-(-tokens // window) * window, keys))
        notes["seen"] = keys
        return notes

    def _nothing(self, samples: Tensor) -> dict[str, Tensor]:
        shape = (*samples.shape[:3], self.args.neighbours)
        scores = wide(samples[:, :, :0]).new_full(shape, -torch.inf)
        return {"scores": scores, "lists": torch.zeros(shape, dtype=torch.int32, device=samples.device)}

    def _enter(self, view: View, notes: dict[str, Any], begin: Tensor, count: int) -> None:
        """Enter the keys from position `begin [B]` up to the boundary, at most `count`, into the lists, in place."""
        samples = wide(notes["queries"]).unflatten(1, (view.k.shape[2], -1))
        end, (scores, lists) = self._boundary(lengths(view)), (notes["scores"], notes["lists"])
        for part in slices(count, samples[..., 0].numel()):
            places = end[:, None] - 1 - torch.arange(part.start, part.stop, device=end.device)  # [B, C]
            fresh = (places >= begin[:, None]) & (places >= self.args.sinks)
            slots = places.clamp(min=0) if view.starts is None else places.clamp(min=0) + view.starts[:, None]
            k = wide(view.k.take_along_dim(slots[..., None, None], 1))
            new = torch.einsum("bgmnk,bcgk->bgmnc", samples, k).flatten(1, 2)
            new = new.masked_fill(~fresh[:, None, None], -torch.inf)
            both = torch.cat([scores, new], -1).topk(self.args.neighbours)
            names = torch.cat([lists, places.int()[:, None, None].expand(*new.shape)], -1)
            lists.copy_(names.gather(-1, both.indices))
            scores.copy_(both.values)


class RetrievalAttentionMixer(SparseAttention):
    options = Args
    method = RetrievalAttention

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        """With the index of a text that was read in one call."""
        keys, a = super().state_bytes(length, itemsize), self.args
        if a.everything:
            return keys
        wide_bytes = max(itemsize, torch.float32.itemsize)
        each = self.head_dim * itemsize + a.neighbours * (wide_bytes + torch.int32.itemsize)
        return keys + -(-length // a.stride) * (self.heads * each + 1)


MODULE = RetrievalAttentionMixer
