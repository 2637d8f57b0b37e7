"""ClusterFormer: attention among words of one cluster, with centroids that learn beside the task (Wang et al. 2022, ACL
2022, "ClusterFormer: Neural Clustering Attention for Efficient and Effective Transformer").

    c_i  <- sum over j of softmax_j((c_i W) . x_j / sqrt(D)) x_j        the first layer's c are learned, the next ones'
    I_j  =  argmax over i of cos(c_i, x_j)                              are those of the layer before
    o    =  attention of the words, sorted by (I, position), of each chunk to the own and the previous chunk
    loss += clustering * mean over j of -cos(c_(I_j), x_j)  +  sorting * mean over i of -cos(c_i, c_(i+1))

The second term makes neighbouring clusters alike, so that words of a cut cluster still meet their like. Centroids get
gradients from these terms alone, which the mixer adds in training whatever the loss is. The paper takes chunks of T / C
words. The centroids have read the whole text, so that no token can be predicted: it is for encoders.

B batch, T tokens, C centroids, D hidden size, H heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.buckets import back, both_sides, bucket_lists
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer, grouped
from zoo.errors import ZooError

CENTROIDS = "clusterformer_centroids"
BEFORE = (("clusterformer", {"heads": 4, "head_dim": 16, "clusters": 3, "chunk": 4}),)
EXAMPLE = {"heads": 4, "head_dim": 16, "chunk": 4}
VARIANTS = {"own": {**EXAMPLE, "clusters": 5, "chunk": 3, "bias": True}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`clusters` is C in a layer with centroids of its own (None: those of the layer before go on); `chunk` words
    attend together; `clustering` and `sorting` weigh the terms of the loss."""

    heads: int
    head_dim: int
    chunk: int = 64
    clusters: int | None = None
    clustering: float = 0.1
    sorting: float = 0.1
    bias: bool = False

    def check(self, config: DecoderConfig) -> None:
        check_sizes(heads=self.heads, head_dim=self.head_dim, chunk=self.chunk)
        if self.clusters is not None and self.clusters < 2:
            raise ZooError(f"clusters was {self.clusters}; it must be at least 2")
        if self.clustering <= 0 or self.sorting < 0:
            raise ZooError(
                f"clustering was {self.clustering} and sorting {self.sorting}; clustering must be above 0, or "
                "centroids learn nothing, and sorting at least 0"
            )


class Clusterformer(Mixer):
    options = Args
    encoder_only = True
    packed = False
    chooses = True
    writes = (CENTROIDS,)

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, inner = args, args.heads * args.head_dim
        for name in ("q", "k", "v"):
            self.add_module(f"{name}_proj", nn.Linear(config.hidden_size, inner, bias=args.bias))
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=args.bias)
        self.centroid_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if args.clusters is not None:
            self.centroids = nn.Parameter(torch.zeros(args.clusters, config.hidden_size))

    def init_weights(self, std: float) -> None:
        if self.args.clusters is not None:
            initialization.normal_(self.centroids)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"clusters": 8}

    @classmethod
    def reads_of(cls, args: Args) -> tuple[str, ...]:
        return (CENTROIDS,) if args.clusters is None else ()

    def forward(self, x: Tensor, ctx: Context, cache: object = None) -> tuple[Tensor, dict[str, Tensor]]:
        """`x [B, T, D] -> [B, T, D]`, and the centroids `[B, C, D]` for the next layer."""
        centroids = self.moved(x, ctx)
        near = torch.einsum("bcd,btd->btc", F.normalize(centroids, dim=-1), F.normalize(x, dim=-1))
        q, k, v = (grouped(self.get_submodule(f"{name}_proj")(x), self.args.heads) for name in "qkv")
        view, order = both_sides(q, k, v, ctx, None)
        cluster = near.argmax(-1) if order is None else near.argmax(-1).gather(1, order.argsort(1))
        cluster = cluster[..., None].expand(-1, -1, self.args.heads)
        lists = bucket_lists(view, cluster, self.args.chunk, 1, causal=False, own=True)
        o = back(view.attend(lists, query_block=1, block=1, causal=False), order)
        y: Tensor = self.o_proj(o.flatten(-2))
        return (WithLoss.apply(y, self.loss(near, centroids, ctx)) if self.training else y), {CENTROIDS: centroids}

    def moved(self, x: Tensor, ctx: Context) -> Tensor:
        """`[B, C, D]`: each centroid among the words that are like it."""
        own = self.args.clusters is not None
        old = self.centroids.to(x.dtype).expand(x.shape[0], -1, -1) if own else ctx.values[CENTROIDS]
        scores = self.centroid_proj(old) @ x.mT * x.shape[-1] ** -0.5
        if ctx.padding_mask is not None:
            scores = scores.masked_fill(~ctx.padding_mask[:, None], torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ x

    def loss(self, near: Tensor, centroids: Tensor, ctx: Context) -> Tensor:
        """What training adds to the loss: by how little words are like their centroids `near [B, T, C]`, and centroids
        like the next ones."""
        best = near.amax(-1)
        real = torch.ones_like(best) if ctx.padding_mask is None else ctx.padding_mask.to(best.dtype)
        words = (best * real).sum() / real.sum()
        alike = F.cosine_similarity(centroids[:, 1:], centroids[:, :-1], dim=-1).mean()
        return -self.args.clustering * words - self.args.sorting * alike


class WithLoss(torch.autograd.Function):
    """`y`, whose gradient brings with it that of a loss of its own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


MODULE = Clusterformer
