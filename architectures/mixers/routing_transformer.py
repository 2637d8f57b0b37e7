"""Routing Transformer: attention among tokens of one cluster (Roy et al. 2020, arXiv 2003.05997).

Some heads attend to a window. The others share queries and keys, q = k = layer norm of x W, and compare them with C
centroids mu, which follow the tokens nearest to them:

    mu_c <- decay mu_c + (1 - decay) mean of {k_j : argmax over c of k_j . mu_c is c}       one step per training step
    o_i  = mean over the clusters c of i of softmax over j <= i in c of (q_i . k_j / sqrt(K)) v_j

`assign` says which tokens are in a cluster:

    top       its `members` nearest tokens of the text, as published; a token may be in several clusters, or in none and
              read nothing. Tokens to come can take the place of earlier ones, so that these have a say in what is read,
              though none is read itself; a decoded token reads what it would as the last of its text, at the cost of
              comparing all keys with the centroids.
    nearest   those that have it as their nearest centroid; a token reads the last `members` before it and itself: the
              same set in training and in decoding.

B batch, T new tokens, S keys, D hidden size, H heads that route, K head dimension, C clusters, W members, N queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.buckets import Slots, back, both_sides, bucket_lists
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys, all_tokens
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer, grouped, keep_fp32, wide
from zoo.architectures.core.recurrent import check_rope
from zoo.architectures.core.sparse import View, view_of
from zoo.architectures.mixers import attention as softmax
from zoo.errors import ZooError
from zoo.kernels.attention import PADDING, attention

ASSIGN = ("top", "nearest")
EXAMPLE = {"heads": 4, "head_dim": 16, "window": 5, "clusters": 3, "members": 48, "rope": "default"}
VARIANTS = {"nearest": {**EXAMPLE, "assign": "nearest", "members": 3, "local_heads": 0, "decay": 1.0}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`local_heads` of the `heads` (None: half) see a window, counted with the own token, and carry `rope`."""

    heads: int
    head_dim: int
    local_heads: int | None = None
    window: int = 256
    clusters: int = 16
    members: int = 256
    assign: str = "top"
    decay: float = 0.999
    rope: str | None = None

    @property
    def local(self) -> int:
        return self.heads // 2 if self.local_heads is None else self.local_heads

    def check(self, config: DecoderConfig) -> None:
        sizes = dict(heads=self.heads, head_dim=self.head_dim, window=self.window, clusters=self.clusters)
        check_sizes(**sizes, members=self.members)
        check_rope(self.rope, config)
        if not 0 <= self.local < self.heads:
            raise ZooError(f"local_heads was {self.local}; it must be at least 0 and less than heads ({self.heads})")
        if self.assign not in ASSIGN:
            raise ZooError(f"assign was {self.assign!r}; it must be one of {', '.join(ASSIGN)}")
        if not 0 <= self.decay <= 1:
            raise ZooError(f"decay was {self.decay}; it must be 0 to 1")


class RoutingTransformer(Mixer):
    options = Args
    bidirectional = True
    chooses = True
    centroids: Tensor  # [H, C, K]

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.heads = args, args.heads - args.local
        width = self.heads * args.head_dim
        if args.local:
            kind = dict(heads=args.local, head_dim=args.head_dim, window=args.window, rope=args.rope)
            self.local = softmax.Attention(config, softmax.Attention.parse(kind))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.register_buffer("centroids", keep_fp32(torch.zeros(self.heads, args.clusters, args.head_dim)))

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"rope": "default"}

    def init_weights(self, std: float) -> None:
        initialization.normal_(self.centroids)

    @property
    def phase_consistent(self) -> bool:  # type: ignore[override]
        return bool(self.args.assign == "nearest")

    @property
    def packed(self) -> bool:  # type: ignore[override]
        return bool(self.args.assign == "nearest")

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        views = (None, None) if cache is None else (cache.view("local"), cache.view("routed"))
        y: Tensor = self.o_proj(self.routed(x, ctx, views[1]).flatten(-2))
        return y + self.local(x, ctx, views[0]) if self.args.local else y

    def routed(self, x: Tensor, ctx: Context, cache: Any) -> Tensor:
        """`[B, T, H, K]` of the heads that route."""
        k, v = (grouped(projection(x), self.heads) for projection in (self.q_proj, self.v_proj))
        k = F.layer_norm(k, k.shape[-1:])
        if self.training and k.requires_grad and self.args.decay < 1:
            k.register_hook(partial(self.follow, k.detach(), ctx.padding_mask))
        if ctx.causal:
            seen, q_at, k_at = all_tokens({"k": k, "v": v}, ctx, cache)
            view, order = view_of(k, Keys(seen["k"], seen["v"], q_at, k_at, cache), ctx, None), None
        else:
            view, order = both_sides(k, k, v, ctx, None)
        return back(self.near(view, ctx.causal) if self.args.assign == "nearest" else self.top(view, ctx.causal), order)

    def near(self, view: View, causal: bool) -> Tensor:
        buckets = self.likeness(view.k).argmax(-1)
        lists = bucket_lists(view, buckets, self.args.members, causal=causal, own=True)
        return view.attend(lists, query_block=1, block=1, causal=causal)

    def top(self, view: View, causal: bool) -> Tensor:
        """Attention inside each cluster, of all of them at once."""
        (b, t, h, width), w, at = view.q.shape, min(self.args.members, view.k.shape[1]), Slots.of(view)
        likeness = self.likeness(view.k).masked_fill((at.owner < 0)[..., None, None], -torch.inf)
        near, slots = likeness.permute(0, 2, 3, 1).topk(w)
        slots = slots.masked_fill(near == -torch.inf, -1).sort(-1).values  # [B, H, C, W], by position
        k, v = (_members(x, slots) for x in (view.k, view.v))
        begin = view.query_positions()[..., :1, None, None] + (
            0 if view.starts is None else view.starts.view(-1, 1, 1, 1)
        )
        asked = (slots - begin)[..., -min(w, t) :]  # [B, H, C, N], which of the queries, if any
        asked = asked.masked_fill((asked < 0) | (slots[..., -min(w, t) :] < 0), t)
        q = _members(view.q, asked.clamp(max=t - 1))
        places: dict[str, Any] = dict(
            q_positions=slots[..., -min(w, t) :].flatten(0, 2),
            k_positions=slots.masked_fill(slots < 0, PADDING).flatten(0, 2),
        )
        o = attention(q, k, v, causal=causal, scale=view.scale, **places).view(b, h, -1, width)
        index = asked.flatten(2)[..., None]
        total = o.new_zeros(b, h, t + 1, width).scatter_add(2, index.expand_as(o), o)
        often = o.new_zeros(b, h, t + 1, 1).scatter_add(2, index, torch.ones_like(o[..., :1]))
        return (total / often.clamp(min=1))[:, :, :t].transpose(1, 2)

    def likeness(self, k: Tensor) -> Tensor:
        """`[B, S, H, C]`: how near keys `[B, S, H, K]` are to the centroids."""
        return torch.einsum("bshk,hck->bshc", wide(k.detach()), self.centroids.to(wide(k[:, :0]).dtype))

    @torch.no_grad()
    def follow(self, k: Tensor, mask: Tensor | None, _: Tensor) -> None:
        """Move the centroids to the keys of a step, once its gradient has come by: what is computed anew in the
        backward pass still finds them as they were."""
        member = F.one_hot(self.likeness(k).argmax(-1), self.args.clusters).to(self.centroids.dtype)
        member = member if mask is None else member * mask[..., None, None]
        count = member.sum((0, 1))[..., None]
        means = torch.einsum("bshc,bshk->hck", member, k.to(member.dtype)) / count.clamp(min=1)
        self.centroids.lerp_(torch.where(count > 0, means, self.centroids), 1 - self.args.decay)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        routed = 2 * self.heads * self.args.head_dim * itemsize * length
        return routed + (self.local.state_bytes(length, itemsize) if self.args.local else 0)


def _members(x: Tensor, slots: Tensor) -> Tensor:
    """Of `x [B, S, H, K]` those in `slots [B, H, C, N]`, any where there is none, as `[B H C, N, 1, K]`."""
    index = slots.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    taken = x.transpose(1, 2).gather(2, index)
    return taken.view(-1, slots.shape[3], 1, x.shape[3])


MODULE = RoutingTransformer
