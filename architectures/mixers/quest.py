"""Quest: decode reads the pages whose keys could score most (Tang et al. 2024, arXiv 2406.10774).

    bound(q, page) = sum over d of max(q_d M_d, q_d m_d)     M, m the largest and smallest k_d of the page

No key of a page scores more than its bound. The pages of the highest bounds are read, the newest one always; query
heads that share a KV head share pages. Prefill is dense. The cache notes the bounds of each page.

B batch, S keys, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoo.architectures.core.block_lists import check_block
from zoo.architectures.core.pages import Paged, PagedAttention, Pages
from zoo.architectures.core.sparse import SparseArgs, View

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
        check_block("page", self.page)
        super().check_method()


class Quest(Paged):
    name = "quest"

    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.pages = Pages(args.page)

    def decode(self, view: View) -> Tensor:
        blocks, counts = self.pages.select(view, view.q, self.args.schedule, scale=view.scale)
        return view.attend(blocks, counts, query_block=1, block=self.args.page)


class QuestAttention(PagedAttention):
    options = Args
    method = Quest


MODULE = QuestAttention
