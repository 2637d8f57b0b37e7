"""ClusterKV: decode reads the keys of the clusters nearest to the query (Liu et al. 2024, arXiv 2412.03213).

    D(i, j) = 1 - <k_i, k_j> / |k_i||k_j|      clusters by k-means under D, with means mu_c
    clusters by falling q . mu_c, until their tokens fill the budget, of the last one only as many as fit

The paper clusters the prompt as one and what is decoded in batches of `segment` tokens; here the prompt is cut in such
batches too, so that clusters depend on the keys alone. Sink tokens and the last `segment` tokens, of which some are in
no cluster yet, are always read and part of the budget. Query heads that share a KV head share its keys: clusters rank
by the mean of the heads' softmax over tokens that score as their means do. Prefill is dense.

With padding, or in a static cache, only the device knows when a segment is full, and it clusters the newest one anew
for every token.

B batch, S keys, H query heads, G KV heads, M query heads of each, K head dimension, n segments of N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.choosing import chooses, lengths
from zoo.architectures.core.clusters import segment_bytes, segment_clusters
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import wide
from zoo.architectures.core.sparse import Method, SparseArgs, SparseAttention, View
from zoo.errors import ZooError
from zoo.kernels.block_sparse_attention.select import choose_blocks

EXAMPLE = {
    **{"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"},
    **{"segment": 4, "cluster": 2, "sinks": 2, "iterations": 3, "budget": 1.0},
}
VARIANTS = {"small": {**EXAMPLE, "budget": 32}}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`segment` tokens are clustered together, in clusters of `cluster` tokens on average, by `iterations` of k-means;
    the first `sinks` tokens are always read."""

    segment: int = 320
    cluster: int = 80
    sinks: int = 16
    iterations: int = 10

    def check_method(self) -> None:
        check_sizes(segment=self.segment, cluster=self.cluster, iterations=self.iterations)
        if self.segment % self.cluster or self.segment // self.cluster > torch.iinfo(torch.int16).max:
            raise ZooError(f"cluster was {self.cluster}; it must divide segment ({self.segment})")
        if self.sinks < 0:
            raise ZooError(f"sinks was {self.sinks}; it must be at least 0")
        super().check_method()


class ClusterKV(Method):
    phases = ("decode",)
    name = "cluster_kv"

    def observe(self, view: View) -> None:
        if view.notes is not None and not self.args.everything:
            self.clusters(view)

    @chooses
    def clusters(self, view: View) -> tuple[Tensor, Tensor]:
        return segment_clusters(view, self.args.segment, self.args.cluster, self.args.iterations)

    def decode(self, view: View) -> Tensor:
        if self.args.everything:
            return view.dense()
        labels, means = self.clusters(view)
        if not labels.shape[1]:
            return view.dense()
        kept = dict(local=self.args.segment, sink=self.args.sinks, **view.places)
        weights = self.weights(view, labels, means)
        lists = choose_blocks(weights, view.q, view.k, self.args.schedule, query_block=1, block=1, **kept)
        return view.attend(*lists, query_block=1, block=1)

    @chooses
    def weights(self, view: View, labels: Tensor, means: Tensor) -> Tensor:
        """`[B, G, 1, S]` by the positions of the keys; of budgets by mass shares, else their logarithms."""
        q = wide(view.q[:, 0]).unflatten(1, (means.shape[2], -1))
        scores = view.factor * torch.einsum("bgmk,bngck->bgmnc", q, wide(means))
        index = labels.long().movedim(1, 2)[:, :, None].expand(-1, -1, q.shape[2], -1, -1)
        scores = scores.gather(4, index)  # [B, G, M, n, N]
        full = torch.arange(labels.shape[1], device=q.device) < (lengths(view) // self.args.segment)[:, None]
        scores = scores.masked_fill(~full[:, None, None, :, None], -torch.inf).flatten(3)
        shares = (scores.log_softmax(-1).logsumexp(2, keepdim=True) - math.log(q.shape[2])).nan_to_num(nan=-torch.inf)
        shares = F.pad(shares, (0, view.k.shape[1] - shares.shape[3]), value=-torch.inf)
        return shares.exp() if self.args.schedule.mass is not None else shares


class ClusterKVAttention(SparseAttention):
    options = Args
    method = ClusterKV

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        keys, a = super().state_bytes(length, itemsize), self.args
        if a.everything:
            return keys
        return keys + segment_bytes(length, a.segment, a.cluster, self.kv_heads, self.head_dim, itemsize)


MODULE = ClusterKVAttention
