"""Strided attention of the Sparse Transformer (Child et al. 2019, arXiv 1904.10509).

Query i sees its `stride` predecessors and, further back, every `stride`-th key:

    A_i = {i - l, ..., i}  and  {j : (i - j) mod l = 0},   l = stride

No key is ever out of sight for good, so that the cache keeps all of them.

B batch, T new tokens, H query heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.softmax import SoftmaxArgs, SoftmaxAttention
from zoo.errors import ZooError
from zoo.kernels.attention import attention

PARTS = ("both", "local", "column")
EXAMPLE = {"heads": 4, "head_dim": 16, "stride": 4}
VARIANTS = {
    "local": {**EXAMPLE, "part": "local", "kv_heads": 2, "rope": "default"},
    "column": {**EXAMPLE, "part": "column", "stride": 3},
}


def check_part(part: str) -> None:
    if part not in PARTS:
        raise ZooError(f"part was {part!r}; it must be one of {', '.join(PARTS)}")


@dataclass(frozen=True, kw_only=True)
class Args(SoftmaxArgs):
    """`part` takes both sets in one softmax (the merged head), or only one of them, for layers that take turns."""

    stride: int
    part: str = "both"

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(stride=self.stride)
        check_part(self.part)


class StridedAttention(SoftmaxAttention):
    options = Args

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"stride": 128}

    @property
    def recent(self) -> int | None:
        return self.args.stride if self.args.part == "local" else None

    def attend(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        window = None if self.args.part == "column" else self.args.stride + 1
        stride = None if self.args.part == "local" else self.args.stride
        o: Tensor = attention(q, keys.k, keys.v, window=window, stride=stride, **self.call(keys, ctx))
        return o


MODULE = StridedAttention
