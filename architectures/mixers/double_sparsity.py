"""Double Sparsity: decode reads the tokens whose keys score most by a few of their channels (Yang et al. 2024,
arXiv 2408.07092).

    s_j = scale sum over c in C of q_c k_jc        S(t) = the tokens j <= t of the highest s_j, and t

C holds the label channels of a KV head, those that were found to weigh most (`calibrate`): mean over tokens t of
|q_tc k_tc|, and over the query heads of the KV head. The cache notes k_C beside the keys. Prefill is dense.

B batch, T tokens, H query heads, G KV heads, K head dimension, R label channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.pages import Paged, PagedAttention, Pages
from zoo.architectures.core.sparse import SparseArgs, View
from zoo.errors import ZooError

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "budget": 1.0}
VARIANTS = {"shared": {**EXAMPLE, "channels": ((3, 11), (0, 8)), "share": True, "budget": 24}}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`channels` are the label channels of each KV head; without them there are `labels` (by default a sixteenth of
    the head's channels), spread evenly. With `share`, query heads that share a KV head share tokens."""

    budget: Any = 128
    labels: int | None = None
    channels: tuple[tuple[int, ...], ...] | None = None
    share: bool = False

    @property
    def count(self) -> int:
        """Label channels of a KV head."""
        if self.channels is not None:
            return len(self.channels[0])
        return self.labels or max(1, self.head_dim // 16)

    def check_method(self) -> None:
        super().check_method()
        if self.labels is not None and not 1 <= self.labels <= self.head_dim:
            raise ZooError(f"labels was {self.labels}; it must be 1 to head_dim {self.head_dim}")
        kv_heads = self.kv_heads or self.heads
        if self.channels is None:
            return
        right = len(self.channels) == kv_heads and len({len(row) for row in self.channels}) == 1 and self.channels[0]
        if not right or not all(0 <= c < self.head_dim for row in self.channels for c in row):
            raise ZooError(
                f"channels was {self.channels!r}; it must have equally many channels, of 0 to {self.head_dim - 1}, "
                f"for each of {kv_heads} KV heads"
            )


class DoubleSparsity(Paged):
    name = "double_sparsity"

    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.pages = Pages(1, self.labels)
        spread = tuple(c * args.head_dim // args.count for c in range(args.count))
        self.channels = args.channels or (spread,) * (args.kv_heads or args.heads)
        self.index: dict[torch.device, Tensor] = {}

    def labels(self, x: Tensor) -> Tensor:
        """The label channels `[B, T, H or G, R]` of queries or keys `[B, T, H or G, K]`."""
        if x.device not in self.index:  # once: each copy to a device would wait for it
            with torch.inference_mode(False):
                self.index[x.device] = torch.tensor(self.channels, device=x.device)
        index = self.index[x.device]
        index = index[:, None].expand(-1, x.shape[2] // len(index), -1).flatten(0, 1)
        return x.gather(3, index.expand(*x.shape[:2], -1, -1))

    def decode(self, view: View) -> Tensor:
        options: dict[str, Any] = dict(heads="kv" if self.args.share else "query")
        scale = view.factor
        tokens, counts = self.pages.select(view, self.labels(view.q), self.args.schedule, scale=scale, **options)
        return view.attend(tokens, counts, query_block=1, block=1)


class DoubleSparsityAttention(PagedAttention):
    options = Args
    method = DoubleSparsity

    @property
    def features(self) -> int:
        count: int = self.args.count
        return count


def calibrate(view: View, args: Args) -> dict[str, Any]:
    """The channels of each KV head with the largest mean |q_c k_c|, q and k of the same token."""
    tokens, group = view.q.shape[1], view.q.shape[2] // view.k.shape[2]
    k = view.k[:, view.k.shape[1] - tokens :].repeat_interleave(group, 2)
    real = (torch.atleast_2d(view.query_positions()) >= 0)[..., None, None]
    weight = (view.q.float() * k.float()).abs().masked_fill(~real, 0.0).sum((0, 1))
    top = weight.unflatten(0, (-1, group)).sum(1).topk(args.count, -1).indices
    return {"channels": [sorted(row) for row in top.tolist()]}


MODULE = DoubleSparsityAttention
