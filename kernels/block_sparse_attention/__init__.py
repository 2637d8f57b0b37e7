"""Softmax attention of every query over listed blocks of keys.

    o_i = sum over j in S(i) of softmax_j(scale q_i . k_j + bias) v_j
    S(i) = {j <= i} & (listed blocks of i's query block | columns | window | sink tokens)

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads (H a multiple of Hk), K and V head widths; Hs heads of
the lists, Hk or H; Nq query blocks; S listed blocks; C columns.
"""

from typing import Any

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.block_sparse_attention.call import Call
from zoo.kernels.block_sparse_attention.rows import query_blocks
from zoo.kernels.block_sparse_attention.validate import check_integers, check_size, check_tokens

__all__ = ["block_sparse_attention", "query_blocks"]

BACKENDS = dispatch.load(__name__)
SIZES = (1, *range(16, 129))
LARGE = range(256, 4097, 128)  # blocks of keys alone


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor | None = None, *, query_block: int, block: int,
    columns: Tensor | None = None, bias: Tensor | None = None, causal: bool = True, window: int = 0,
    sink_tokens: int = 0, q_positions: Tensor | None = None, starts: Tensor | None = None, scale: float | None = None,
    return_lse: bool = False, cu_seqlens: Tensor | None = None, backend: str | None = None,
) -> Any:  # fmt: skip
    """Attention of every query over the key blocks that its query block lists.

    Blocks of queries and of keys count real tokens of each sequence: key block c holds the keys at positions
    c * block .. (c + 1) * block - 1. A key that is reached in several ways counts once.

    Args:
        q: [B, Tq, H, K]; k: [B, Tk, Hk, K]; v: [B, Tk, Hk, V]. Query head h uses key head h // (H // Hk).
        blocks: [B, Hs, Nq, S], int32 or int64, the key blocks of each query block, in any order. Query head h uses
            list h // (H // Hs). Numbers that are negative or beyond the keys name no block; repeated ones count once.
            Nq is `query_blocks(Tq, query_block, cu_seqlens)`.
        counts: [B, Hs, Nq], int32 or int64: only that many entries of a list are read. Default: all of them.
        query_block, block: 1, or 16 to 128; block also a multiple of 128 up to 4096. Block 1 is a list of tokens,
            query_block 1 one list per query.
        columns: [B, Hs, C] ([N, Hs, C] for N packed sequences), int32 or int64: key positions that every query
            sees. Negative ones and those beyond the keys are not used.
        bias: [B, Hs, Nq, S], fp32 (fp64), added to the scores of a listed block's keys. Of a repeated block the first
            one's is; keys that columns, the window or sink tokens show anyhow have none.
        causal: key j is visible only if its position is not later than the query's.
        window: the `window` nearest keys are visible, the own one counted (on both sides without `causal`).
        sink_tokens: keys at positions below this are visible.
        q_positions: integers, [Tq] or [B, Tq], consecutive in each row. Default: the last Tq of the keys'. A query at
            a negative position is padding and sees nothing; query blocks count from the first one at 0 or later.
        starts: integers [B], tokens of padding before the first key of each row; that key is at position 0.
        scale: factor on the scores, K ** -0.5 by default.
        return_lse: also return the log of the softmax's denominator.
        cu_seqlens: int32 [N + 1], B = 1, Tq = Tk: sequences packed along T do not see each other.
        backend: pin one of this op's backends.

    Returns:
        o [B, Tq, H, V] in q's dtype; with `return_lse` the pair (o, lse), lse [B, Tq, H] fp32 (fp64), differentiable.
        A query that sees no key gets o = 0, lse = -inf and zero gradient.

    Raises:
        ValueError: a shape, dtype, device or option is wrong, or the pinned backend cannot run the call.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.check_keys(q, k, v)
    call = Call(
        *(q, k, v, blocks, counts, columns, bias, q_positions, starts, cu_seqlens, query_block, block),
        *(causal, window, sink_tokens, checks.default_scale(scale, q)),
    )
    check_tokens(q, k, q_positions, starts, cu_seqlens)
    _check_options(call)
    _check_lists(call)
    with checks.autocast_off(q):
        o, lse = dispatch.select(BACKENDS, backend, (call,)).run(call)
    return (o, lse) if return_lse else o


def _check_options(call: Call) -> None:
    for name, also in (("query_block", ()), ("block", LARGE)):
        size = getattr(call, name)
        if not isinstance(size, int) or isinstance(size, bool) or not (size in SIZES or size in also):
            more = ", or a multiple of 128 up to 4096" if also else ""
            raise ValueError(f"{name} is {size!r}; it must be 1 or an integer of 16 to 128{more}")
    for name in ("window", "sink_tokens"):
        check_size(name, getattr(call, name), 0)
    if not isinstance(call.causal, bool):
        raise ValueError(f"causal is {call.causal!r}; it must be True or False")


def _check_lists(call: Call) -> None:
    q, blocks = call.q, call.blocks
    checks.check_shape("blocks", blocks, None, "B Hs Nq S")
    heads = (call.k.shape[2], q.shape[2])
    count = query_blocks(q.shape[1], call.query_block, call.cu_seqlens)
    shape = (q.shape[0], blocks.shape[1] if blocks.shape[1] in heads else heads[0], count, max(blocks.shape[3], 1))
    check_integers("blocks", blocks, q, [shape], "B Hs Nq S")
    if call.counts is not None:
        check_integers("counts", call.counts, q, [shape[:3]], "B Hs Nq")
    if call.columns is not None:
        checks.check_shape("columns", call.columns, None, "N Hs C")
        rows = checks.count_sequences(q, call.cu_seqlens)
        check_integers("columns", call.columns, q, [(rows, shape[1], call.columns.shape[2])], "N Hs C")
    checks.check_gate("bias", call.bias, q, shape, "B Hs Nq S")
