"""Clusters of cached keys: a text is cut in segments of a fixed length, and the keys of each full segment are clustered
by k-means under the cosine distance 1 - <k, c> / |k||c|.

What was clustered never changes, so that notes about the clusters grow with the cache.

B batch, S keys, G KV heads, K head dimension, n segments of N tokens, C clusters of a segment.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.choosing import follows, lengths, widened
from zoo.architectures.core.mixer import wide
from zoo.architectures.core.sparse import View


def kmeans(x: Tensor, count: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Labels `[..., N]` and the means `[..., C, K]` of `count` clusters of `x [..., N, K]`.

    Clusters start at vectors spread evenly over the N; one that loses all its vectors keeps its mean.
    """
    units, start = F.normalize(x, dim=-1), torch.arange(count, device=x.device) * x.shape[-2] // count
    means = x[..., start, :]
    labels = units.new_zeros(units.shape[:-1], dtype=torch.long)
    for _ in range(iterations):
        labels = (units @ F.normalize(means, dim=-1).mT).argmax(-1)
        member = F.one_hot(labels, count).to(x.dtype)
        sizes = member.sum(-2)[..., None]
        means = torch.where(sizes > 0, member.mT @ x / sizes.clamp(min=1), means)
    return labels, means


def segment_bytes(length: int, segment: int, cluster: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of the notes about `length` keys."""
    means = segment // cluster * head_dim * itemsize
    return length // segment * kv_heads * (segment * torch.int16.itemsize + means)


def segment_clusters(view: View, segment: int, cluster: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Labels `[B, n, G, N]`, int16, and means `[B, n, G, C, K]` of all segments that the keys could fill; they mean
    nothing where a row has not filled a segment yet. From the notes, where these follow the cache."""
    keys, notes = view.k.shape[1], {} if view.notes is None else view.notes
    if "labels" not in notes or not follows(view, notes["seen"], notes["labels"]):
        first = torch.arange(keys // segment, device=view.k.device).expand(view.k.shape[0], -1)
        notes["labels"], notes["means"] = _clustered(view, first, segment, cluster, iterations)
    else:
        _extend(view, notes, segment, cluster, iterations)
    notes["seen"] = keys
    return notes["labels"], notes["means"]


def _extend(view: View, notes: dict[str, Any], segment: int, cluster: int, iterations: int) -> None:
    """Cluster, in place, the segments that this call may have filled."""
    tokens, count, held = view.q.shape[1], view.k.shape[1] // segment, notes["labels"].shape[1]
    for name in ("labels", "means"):
        notes[name] = widened(notes[name], count)
    if view.q_positions is None and view.starts is None and count == held:
        return  # elsewhere only the device knows where a row's segments end
    newest = torch.arange(min(tokens // segment + 1, count), device=view.k.device)
    index = (lengths(view)[:, None] // segment - 1 - newest).clamp(0, max(count - 1, 0))
    for name, new in zip(("labels", "means"), _clustered(view, index, segment, cluster, iterations), strict=True):
        place = index.view(*index.shape, *[1] * (new.dim() - 2)).expand_as(new)
        notes[name].scatter_(1, place, new)


def _clustered(view: View, index: Tensor, segment: int, cluster: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Labels and means of the segments `index [B, M]` of each row."""
    b, s, heads, width = view.k.shape
    slots = (index[..., None] * segment + torch.arange(segment, device=index.device)).flatten(1)
    slots = (slots if view.starts is None else slots + view.starts[:, None]).clamp(max=s - 1)
    keys = view.k.gather(1, slots[..., None, None].expand(-1, -1, heads, width))
    parts = wide(keys).unflatten(1, (index.shape[1], segment)).transpose(2, 3)
    labels, means = kmeans(parts, segment // cluster, iterations)
    return labels.to(torch.int16), means.to(view.k.dtype)
