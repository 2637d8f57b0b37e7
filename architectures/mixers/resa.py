"""ReSA: decode reads few pages, and a dense forward rewrites what that has cached (Sun et al. 2025, arXiv 2506.04108).

    score(page) = sum over d of max(q_d M_d, q_d m_d)     q the mean query of the heads that share a KV head

M and m are the largest and smallest k_d of the page. The pages of the highest scores are read, the newest `local` ones
always. Keys and values of later layers inherit the error; so every `frequency` decoded tokens these tokens pass through
the model again, densely and all at once (`core/rectify.py`; `generate` does it by itself). Prefill is dense.

B batch, S keys, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from zoo.architectures.core.pages import Paged, PagedAttention, Pages
from zoo.architectures.core.sparse import SparseArgs, View
from zoo.errors import ZooError

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "budget": 1.0}
VARIANTS = {"small": {**EXAMPLE, "budget": {"fraction": 0.5, "least": 2}, "local": 2, "frequency": 0}}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`page` tokens of a page, 16 to 128; `local` newest pages are read always. `frequency` is the number of decoded
    tokens after which they are rectified; 0: never."""

    budget: Any = field(default_factory=lambda: {"fraction": 0.1, "least": 16})
    page: int = 16
    local: int = 1
    frequency: int = 32

    @property
    def block_size(self) -> int:
        return self.page

    def check_method(self) -> None:
        if not 16 <= self.page <= 128:
            raise ZooError(f"page was {self.page}; it must be 16 to 128")
        if self.local < 1:
            raise ZooError(f"local was {self.local}; it must be at least 1")
        if self.frequency < 0 or self.frequency == 1:
            raise ZooError(f"frequency was {self.frequency}; it must be at least 2, or 0 for never")
        super().check_method()


class ReSA(Paged):
    name = "resa"

    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.pages = Pages(args.page)

    def decode(self, view: View) -> Tensor:
        q = view.q.unflatten(2, (view.k.shape[2], -1)).mean(3)
        pages, counts = self.pages.select(view, q, self.args.schedule, scale=view.scale, local=self.args.local)
        return view.attend(pages, counts, query_block=1, block=self.args.page)


class ReSAAttention(PagedAttention):
    options = Args
    method = ReSA

    @property
    def rectified_every(self) -> int:
        every: int = self.args.frequency
        return every


MODULE = ReSAAttention
