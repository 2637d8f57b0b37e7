"""Dilated attention of LongNet (Ding et al. 2023, arXiv 2307.02486).

Branch i cuts the text into segments of w_i tokens and attends, inside each, among every r_i-th token; head h takes
those at offset h mod r_i. The branches are averaged with the denominators s_i of their softmaxes:

    O = sum_i a_i O_i,   a_i = s_i / sum_j s_j,   O_i among {p : (p mod w_i) mod r_i = h mod r_i} of one segment

which is one softmax over the keys of all branches, where a key counts once for every branch that sees it. A token
that a branch leaves out gets nothing from it.

B batch, T new tokens, S keys, H query heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.softmax import SoftmaxArgs, SoftmaxAttention, known_positions, merge
from zoo.errors import ZooError
from zoo.kernels.attention import attention

EXAMPLE = {"heads": 4, "head_dim": 16, "segments": (3, 6, 12), "dilations": (1, 2, 4)}
VARIANTS = {
    "odd": {**EXAMPLE, "kv_heads": 2, "rope": "default", "segments": (4, 7), "dilations": (1, 3)},
}


@dataclass(frozen=True, kw_only=True)
class Args(SoftmaxArgs):
    """`segments` and `dilations` are the w and r of the branches, one each."""

    segments: tuple[int, ...]
    dilations: tuple[int, ...]

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        if not self.segments or len(self.segments) != len(self.dilations):
            raise ZooError(f"segments was {self.segments} and dilations {self.dilations}; they must be pairs")
        for name in ("segments", "dilations"):
            if min(getattr(self, name)) < 1:
                raise ZooError(f"{name} was {getattr(self, name)}; all must be at least 1")
        if 1 not in self.dilations:
            raise ZooError(f"dilations was {self.dilations}; one must be 1, so that every token sees its own segment")


class DilatedAttention(SoftmaxAttention):
    options = Args

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        """The published branches."""
        branches = {"segments": (2048, 4096, 8192, 16384, 32768), "dilations": (1, 2, 4, 6, 12)}
        return super().default_args(hidden_size, heads) | branches

    @property
    def recent(self) -> int | None:
        return max(self.args.segments) - 1

    def attend(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        queries, _ = known_positions(q, keys, ctx)
        return merge([self._branch(q, keys, ctx, queries, *b) for b in zip(*self._branches(), strict=True)])

    def _branches(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.args.segments, self.args.dilations

    def _branch(
        self, q: Tensor, keys: Keys, ctx: Context, queries: Tensor, segment: int, dilation: int
    ) -> tuple[Tensor, Tensor]:
        """`o [B, T, H, K]` and `lse [B, T, H]`, -inf for the heads that leave a token out."""
        o, lse = attention(q, keys.k, keys.v, chunk=segment, dilation=dilation, return_lse=True, **self.call(keys, ctx))
        offsets = torch.arange(self.heads, device=q.device) % dilation
        left_out = (queries % segment % dilation)[..., None] != offsets
        return o, lse.masked_fill(left_out, -torch.inf)


MODULE = DilatedAttention
