"""Quest: decode reads the pages whose keys could score most (Tang et al. 2024, arXiv 2406.10774).

    bound(q, page) = sum over d of max(q_d M_d, q_d m_d)     M, m the largest and smallest k_d of the page

No key of a page scores more than its bound. The pages of the highest bounds are read, the newest one always; query
heads that share a KV head share pages. Prefill is dense.

B batch, S keys, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoo.architectures.core.sparse import Method, SparseArgs, SparseAttention, View
from zoo.errors import ZooError

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "page": 16, "budget": 1.0}
VARIANTS = {"small": {**EXAMPLE, "budget": 32}}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`page` tokens of a page, 1 or 16 to 128."""

    page: int = 16

    @property
    def block_size(self) -> int:
        return self.page

    def check_method(self) -> None:
        if self.page != 1 and not 16 <= self.page <= 128:
            raise ZooError(f"page was {self.page}; it must be 1 or 16 to 128")
        super().check_method()


class Quest(Method):
    phases = ("decode",)
    name = "quest"

    def decode(self, view: View) -> Tensor:
        sizes = dict(query_block=1, block=self.args.page)
        blocks, counts = view.select(self.args.schedule, score="bounds", **sizes)
        o: Tensor = view.attend(blocks, counts, **sizes)
        return o


class QuestAttention(SparseAttention):
    options = Args
    method = Quest


MODULE = QuestAttention
