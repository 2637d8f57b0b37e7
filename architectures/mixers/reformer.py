"""Reformer: attention among tokens of one hash bucket (Kitaev et al. 2020, arXiv 2001.04451).

    k_j = q_j / |q_j|,   h(x) = argmax of [x R, -x R]          R random, anew in each of `rounds`
    o_i = softmax over j in P_i of (q_i . k_j) v_j             P_i in the order of (h, position)

A token does not see itself, unless it sees nothing else. The rounds are one softmax, in which a key counts once for
every round that finds it. P_i is, by `before`:

    n        the chunk of `chunk` tokens that i falls in and n chunks before it, as published. Chunks depend on how many
             tokens there are in each bucket, so that tokens to come have a say in which earlier ones are read, though
             none is read itself; a decoded token reads what it would as the last of its text.
    None     the last `chunk` tokens before i in its own bucket: the same set in training and in decoding.

B batch, T new tokens, S keys, D hidden size, H heads, K head dimension, R rounds, N buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.buckets import back, both_sides, bucket_lists
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys, all_tokens
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.lsh import draw, rotation_buckets
from zoo.architectures.core.mixer import Context, Mixer, grouped, keep_fp32
from zoo.architectures.core.softmax import merge
from zoo.architectures.core.sparse import View, view_of
from zoo.errors import ZooError

EXAMPLE = {"heads": 4, "head_dim": 16, "chunk": 4, "buckets": 4, "before": None}
VARIANTS = {"chunks": {**EXAMPLE, "chunk": 16, "before": 1, "rounds": 1, "bias": True}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`buckets` is N, even, for texts of any length (the paper takes 2 T / `chunk`); `seed` draws the R, which are
    stored with the weights."""

    heads: int
    head_dim: int
    chunk: int = 64
    before: int | None = 1
    buckets: int = 64
    rounds: int = 2
    bias: bool = False
    seed: int = 0

    def check(self, config: DecoderConfig) -> None:
        check_sizes(heads=self.heads, head_dim=self.head_dim, chunk=self.chunk, rounds=self.rounds)
        if self.buckets < 2 or self.buckets % 2:
            raise ZooError(f"buckets was {self.buckets}; it must be even and at least 2")
        if self.before is not None and self.before < 0:
            raise ZooError(f"before was {self.before}; it must be a number of chunks, or null for a window")


class Reformer(Mixer):
    options = Args
    bidirectional = True
    chooses = True
    rotations: Tensor  # [R, H, K, N / 2]

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, width = args, args.heads * args.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=args.bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=args.bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=args.bias)
        shape = (args.rounds, args.heads, args.head_dim, args.buckets // 2)
        self.register_buffer("rotations", keep_fp32(torch.zeros(shape)))

    def init_weights(self, std: float) -> None:
        initialization.copy_(self.rotations, draw(tuple(self.rotations.shape), self.args.seed))

    @property
    def phase_consistent(self) -> bool:  # type: ignore[override]
        """Chunks of a text are not those of its beginning."""
        return self.args.before is None

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        q, v = (grouped(projection(x), self.args.heads) for projection in (self.q_proj, self.v_proj))
        k = F.normalize(q, dim=-1)
        if ctx.causal:
            seen, q_at, k_at = all_tokens({"k": k, "v": v}, ctx, cache)
            view, order = view_of(q, Keys(seen["k"], seen["v"], q_at, k_at, cache), ctx, 1.0), None
        else:
            view, order = both_sides(q, k, v, ctx, 1.0)
        o, alone = self.attend(view, ctx.causal)
        o = torch.where(back(alone, order), v, back(o, order))
        y: Tensor = self.o_proj(o.flatten(-2))
        return y

    def attend(self, view: View, causal: bool) -> tuple[Tensor, Tensor]:
        """`[B, T, H, K]`, and where a token has nothing to see but itself, `[B, T, H, 1]`."""
        buckets, parts = rotation_buckets(view.k, self.rotations), []
        for number in range(self.args.rounds):
            lists = bucket_lists(view, buckets[..., number], self.args.chunk, self.args.before, causal=causal)
            parts.append(view.attend_lse(lists, query_block=1, block=1, causal=causal))
        alone = torch.stack([lse == -torch.inf for _, lse in parts]).all(0)
        return merge(parts), alone[..., None]

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return 2 * self.args.heads * self.args.head_dim * itemsize * length


MODULE = Reformer
