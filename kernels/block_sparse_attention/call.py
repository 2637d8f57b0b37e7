"""One call of block-sparse attention.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K and V head widths; Hs heads of the lists, Nq query
blocks, S listed blocks, C columns, N sequences.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """The validated arguments of `block_sparse_attention`, the one argument of its backends."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor
    counts: Tensor | None
    columns: Tensor | None
    bias: Tensor | None
    q_positions: Tensor | None
    starts: Tensor | None
    cu_seqlens: Tensor | None
    query_block: int
    block: int
    causal: bool
    window: int
    sink_tokens: int
    scale: float
