"""Fixed attention of the Sparse Transformer (Child et al. 2019, arXiv 1904.10509).

Query i sees its own block of l = `block` tokens and the last c = `summary` tokens of every block:

    A_i = {j : j // l = i // l}  and  {j : j mod l >= l - c},   j <= i

The summaries grow with the text, so that the cache keeps all keys.

B batch, T new tokens, S keys, H query heads, K head dimension.
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
from zoo.architectures.core.softmax import SoftmaxArgs, SoftmaxAttention, known_positions, merge
from zoo.architectures.mixers.strided import check_part
from zoo.errors import ZooError
from zoo.kernels.attention import attention

EXAMPLE = {"heads": 4, "head_dim": 16, "block": 5, "summary": 2}
VARIANTS = {
    "local": {**EXAMPLE, "part": "local", "kv_heads": 2, "rope": "default"},
    "column": {**EXAMPLE, "part": "column"},
}


@dataclass(frozen=True, kw_only=True)
class Args(SoftmaxArgs):
    """`part` takes both sets in one softmax (the merged head), or only one of them, for layers that take turns: local
    is the block, column the summaries. All heads see the same summaries.
    """

    block: int
    summary: int
    part: str = "both"

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(block=self.block, summary=self.summary)
        check_part(self.part)
        if self.summary >= self.block:
            raise ZooError(f"summary was {self.summary}; it must be less than block ({self.block})")


class FixedAttention(SoftmaxAttention):
    options = Args

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"block": 128, "summary": 32}

    @property
    def recent(self) -> int | None:
        return self.args.block - 1 if self.args.part == "local" else None

    def attend(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        if self.args.part == "local":
            o: Tensor = attention(q, keys.k, keys.v, chunk=self.args.block, **self.call(keys, ctx))
            return o
        queries, positions = known_positions(q, keys, ctx)
        summary = positions % self.args.block >= self.args.block - self.args.summary
        parts = self._summaries(q, keys, queries, positions.masked_fill(~summary, UNSEEN), ctx)
        if self.args.part == "both":
            rest = keys._replace(q_positions=queries, k_positions=positions.masked_fill(summary, UNSEEN))
            block = dict(chunk=self.args.block, return_lse=True)
            parts.append(attention(q, keys.k, keys.v, **block, **self.call(rest, ctx)))
        return merge(parts) if parts else torch.zeros_like(q)

    def _summaries(
        self, q: Tensor, keys: Keys, queries: Tensor, positions: Tensor, ctx: Context
    ) -> list[tuple[Tensor, Tensor]]:
        """Attention to the summary tokens; where their places are known, to these tokens alone."""
        seen = Keys(keys.k, keys.v, queries, positions)
        if keys.k_positions is None and ctx.cu_seqlens is None:
            starts = torch.arange(0, keys.k.shape[1], self.args.block, device=q.device) + self.args.block
            places = (starts[:, None] - torch.arange(self.args.summary, 0, -1, device=q.device)).flatten()
            places = places[: self._count(keys.k.shape[1])]
            seen = Keys(keys.k[:, places], keys.v[:, places], queries, places)
        if not seen.k.shape[1]:
            return []
        return [attention(q, seen.k, seen.v, return_lse=True, **self.call(seen, ctx))]

    def _count(self, length: int) -> int:
        """Summary tokens among the first `length`."""
        blocks, rest = divmod(length, self.args.block)
        return blocks * self.args.summary + max(0, rest - self.args.block + self.args.summary)


MODULE = FixedAttention
