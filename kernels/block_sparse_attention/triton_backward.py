# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the gradients of keys and values: a program for each tile of keys, and for each tile of columns.

Formulas are those of `triton_forward`; scores are computed transposed, [BN keys, BM cells], so that no accumulator is
ever transposed. A tile of keys looks at the cells of the query blocks that list it (inverse lists, in ascending order
of their queries) and at those of all tokens whose window or sink tokens it may be in; columns look at all later
tokens. Everything of one key is summed inside one program: no atomics.

An inverse list is `owners[bounds[x]:bounds[x + 1]]` for key block x of a key head; an owner is query block * LISTS +
list, of the LISTS lists of a key head. The cells of an owner are those of its query block, token by token.
"""

import triton
import triton.language as tl

from zoo.kernels.attention.triton_kernels import LOG2E
from zoo.kernels.block_sparse_attention.triton_tiles import (
    COLUMN,
    NEAR,
    PADDING,
    PARTLY,
    key_block_at,
    load_cells,
    load_keys,
    query_block_at,
    sequence_at,
    shown,
    store_cells,
)

SCAN = tl.constexpr(64)  # owners looked at together
SIZES = ["Tq", "Tk", "B", "Nq", "Nk", "C", "splits", "window", "sinks"]


@triton.jit
def owner_at(owners, i, first, end, EACH: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr):
    """The owner of tile i of the cells of an inverse list, where all its cells have one; read one tile ahead."""
    if EACH % BM == 0 and BM % HEADS == 0:
        return tl.load(owners + tl.minimum(first + i // (EACH // BM), end - 1), mask=first < end, other=0)
    return tl.full([], 0, tl.int32)


@triton.jit
def seen_partly(b, owners, first, end, last, layout, M: tl.constexpr, LISTS: tl.constexpr, PACKED: tl.constexpr):
    """How many owners, the first ones of an inverse list, have queries before position `last`."""
    count = end - first
    found = count * 0
    more = found < count
    while more:
        x = found + tl.arange(0, SCAN)
        owner = tl.load(owners + first + x, mask=x < count, other=0)
        _, _, _, at, _, _ = query_block_at(b, owner // LISTS, layout, M, PACKED)
        early = tl.sum(((x < count) & (at < last)).to(tl.int32), 0)
        found += early
        more = early == SCAN
    return found


@triton.jit
def listed_cells(
    b, i, owner, owners, bias, first, end, layout, H: tl.constexpr, HK: tl.constexpr, LISTS: tl.constexpr,
    M: tl.constexpr, PACKED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Cells of tile i of an inverse list, from the first of the key head on: a common one (64-bit), [BM] further, which
    there are, positions of their queries, their lists, and the bias of their scores, if any."""
    HEADS: tl.constexpr = H // HK // LISTS
    EACH: tl.constexpr = M * HEADS
    x = tl.arange(0, BM)
    extra = tl.zeros([BM], tl.float32)
    if EACH % BM == 0 and BM % HEADS == 0:
        _, row, count, place, _, _ = query_block_at(b, owner // LISTS, layout, M, PACKED)
        begin, which = i % (EACH // BM) * (BM // HEADS), owner % LISTS
        if bias is not None:
            extra += tl.load(bias + tl.minimum(first + i // (EACH // BM), end - 1))
        token = x // HEADS
        known, at = token < count - begin, place + begin + token
        base, cell = (row + begin).to(tl.int64) * H + which * HEADS, token * H + x % HEADS
    else:
        x += i * BM
        entry = tl.minimum(first + x // EACH, end - 1)
        own = tl.load(owners + entry)
        if bias is not None:
            extra += tl.load(bias + entry)
        _, row, count, place, _, _ = query_block_at(b, own // LISTS, layout, M, PACKED)
        token, which = x % EACH // HEADS, own % LISTS
        known, at = (first + x // EACH < end) & (token < count), place + token
        base, cell = tl.full([], 0, tl.int64), (row.to(tl.int64) + token) * H + which * HEADS + x % HEADS
    return base, cell, known, at, which, extra


@triton.jit
def later_cells(i, begin, end, row, at, H: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr):
    """Cells of tile i of the tokens begin .. end of a sequence, as in `listed_cells`."""
    x = i * BM + tl.arange(0, BM)
    token = begin + x // HEADS
    known = token < end
    return row.to(tl.int64) * H, token.to(tl.int64) * H + x % HEADS, known, at + token


@triton.jit
def add_gradients(
    KIND: tl.constexpr, d_keys, d_values, keys, values, pk, q, do, norms, delta, base, cell, known, pq, extra, flag,
    masked, k_count, window, sinks, unit, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CAUSAL: tl.constexpr, CLOSE: tl.constexpr, BIAS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a tile of cells adds to the gradients of keys and values."""
    queries = load_cells(q, base, cell, known, K, BK).to(DT)
    grad = load_cells(do, base, cell, known, V, BV).to(DT)
    # Cells that are not there are zeros and add nothing; their weights must be finite.
    norm = tl.load(norms + base + cell, mask=known, other=float("inf") if BIAS else 0.0)
    change = tl.load(delta + base + cell, mask=known, other=0.0)
    s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * unit
    if BIAS:
        s += (extra * LOG2E)[None, :]
    if masked:
        s = tl.where(shown(KIND, pq[None, :], pk[:, None], k_count, flag, window, sinks, CAUSAL, CLOSE), s,
                     -float("inf"))  # fmt: skip
    p = tl.exp2(s - norm[None, :])
    d_values = tl.dot(p.to(DT), grad, d_values, input_precision=PRECISION)
    dp = tl.dot(values, tl.trans(grad), input_precision=PRECISION)
    ds = p * (dp - change[None, :])
    d_keys = tl.dot(ds.to(DT), queries, d_keys, input_precision=PRECISION)
    return d_keys, d_values


@triton.jit
def tokens_near(start, size, q_count, at, window, sinks, CAUSAL: tl.constexpr):
    """The tokens of a sequence that may see keys start .. start + size - 1 as near ones, and no others of its ends."""
    first = tl.maximum(start - at, 0) if CAUSAL else tl.maximum(start - window + 1 - at, 0)
    end = tl.minimum(start + size - 1 + window - at, q_count)
    end = tl.where(window > 0, tl.maximum(end, first), first)
    if CAUSAL:
        end = tl.where(start < sinks, q_count, end)
    else:
        first, end = tl.where(start < sinks, 0, first), tl.where(start < sinks, q_count, end)
    return first, tl.where(size > 0, end, first)


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
    q, k, v, norms, delta, do, bounds, owners, bias, is_column, dk, dv,
    starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk, B, Nq, Nk, C, splits, window, sinks,
    unit, scale, H: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    CLOSE: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dk and dv of all but the columns; one program per BN keys of a block and key head."""
    layout = (starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk)
    PARTS: tl.constexpr = (BLOCK + BN - 1) // BN
    LISTS: tl.constexpr = HS // HK
    EACH: tl.constexpr = M * (H // HS)
    pid = tl.program_id(0)
    head, b, part, c = pid % HK, pid // HK % B, pid // HK // B % PARTS, pid // HK // B // PARTS
    n, start = key_block_at(b, c, layout, BLOCK, PACKED)
    q_row, q_count, at, k_row, k_count = sequence_at(b, n, layout, PACKED)
    size = tl.minimum(tl.minimum(k_count - start, BLOCK) - part * BN, BN)
    start += part * BN
    r = tl.arange(0, BN)
    pk = tl.where(r < size, start + r, PADDING)
    row = (k_row + start).to(tl.int64)
    keys = load_keys(k + head * K, row, r, size, HK * K, True, K, BK).to(DT)
    values = load_keys(v + head * V, row, r, size, HK * V, True, V, BV).to(DT)
    first_head = head * (H // HK)
    q += first_head * K
    do += first_head * V
    norms += first_head
    delta += first_head
    if is_column is not None:
        is_column += (b * HS + head * LISTS).to(tl.int64) * Tk + (k_row - b * Tk)
    x = (b * HK + head).to(tl.int64) * Nk + c
    first, end = tl.load(bounds + x), tl.load(bounds + x + 1)
    d_keys = tl.zeros([BN, BK], tl.float32)
    d_values = tl.zeros([BN, BV], tl.float32)
    total = tl.cdiv((end - first) * EACH, BM)
    edge = total  # tiles from here on are seen whole
    if CAUSAL and not CLOSE and is_column is None:
        partly = seen_partly(b, owners, first, end, start + BN - 1, layout, M, LISTS, PACKED)
        edge = tl.cdiv(partly * EACH, BM)
    following = owner_at(owners, 0, first, end, EACH, H // HS, BM)
    for i in range(0, total):
        owner = following
        following = owner_at(owners, i + 1, first, end, EACH, H // HS, BM)
        base, cell, known, pq, which, extra = listed_cells(
            b, i, owner, owners, bias, first, end, layout, H, HK, LISTS, M, PACKED, BM
        )
        flag = None
        if is_column is not None:
            place = (which + pq * 0)[None, :] * Tk + pk[:, None]
            flag = tl.load(is_column + place, mask=(pk < k_count)[:, None], other=0)
        d_keys, d_values = add_gradients(
            PARTLY, d_keys, d_values, keys, values, pk, q, do, norms, delta, base, cell, known, pq, extra, flag,
            i < edge, k_count, window, sinks, unit, K, V, BK, BV, CAUSAL, CLOSE, bias is not None, DT, PRECISION,
        )  # fmt: skip
    if CLOSE:
        begin, stop = tokens_near(start, size, q_count, at, window, sinks, CAUSAL)
        for i in range(0, tl.cdiv((stop - begin) * (H // HK), BM)):
            base, cell, known, pq = later_cells(i, begin, stop, q_row, at, H, H // HK, BM)
            d_keys, d_values = add_gradients(
                NEAR, d_keys, d_values, keys, values, pk, q, do, norms, delta, base, cell, known, pq, None, None, True,
                k_count, window, sinks, unit, K, V, BK, BV, CAUSAL, CLOSE, False, DT, PRECISION,
            )  # fmt: skip
    store_cells(dk + head * K, d_keys * scale, row * HK, r * HK, r < size, K, BK)
    store_cells(dv + head * V, d_values, row * HK, r * HK, r < size, V, BV)


@triton.jit(do_not_specialize=SIZES)
def column_gradients(
    q, k, v, norms, delta, do, columns, column_counts, dk, dv,
    starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk, B, Nq, Nk, C, splits, window, sinks,
    unit, scale, H: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    CLOSE: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dk and dv [N, HS, splits, C, .] of columns; one program per BN columns of a list and part of the tokens."""
    layout = (starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk)
    HEADS: tl.constexpr = H // HS
    pid, tiles = tl.program_id(0), tl.cdiv(C, BN)
    tile, split, own, n = pid % tiles, pid // tiles % splits, pid // tiles // splits % HS, pid // tiles // splits // HS
    q_row, q_count, at, k_row, k_count = sequence_at(n, n, layout, PACKED)
    line = (n * HS + own).to(tl.int64)
    x = tile * BN + tl.arange(0, BN)
    pk = tl.load(columns + line * C + x, mask=x < tl.load(column_counts + line), other=PADDING)
    head = own * HEADS // (H // HK)
    keys = load_keys(k + head * K, k_row.to(tl.int64), pk.to(tl.int64), k_count, HK * K, True, K, BK).to(DT)
    values = load_keys(v + head * V, k_row.to(tl.int64), pk.to(tl.int64), k_count, HK * V, True, V, BV).to(DT)
    q += own * HEADS * K
    do += own * HEADS * V
    norms += own * HEADS
    delta += own * HEADS
    begin = tl.minimum(tl.maximum(tl.min(pk, 0) - at, 0), q_count) if CAUSAL else q_count * 0
    share = tl.cdiv(q_count - begin, splits)
    begin = tl.minimum(begin + split * share, q_count)
    stop = tl.where(tl.min(pk, 0) < PADDING, tl.minimum(begin + share, q_count), begin)
    d_keys = tl.zeros([BN, BK], tl.float32)
    d_values = tl.zeros([BN, BV], tl.float32)
    for i in range(0, tl.cdiv((stop - begin) * HEADS, BM)):
        base, cell, known, pq = later_cells(i, begin, stop, q_row, at, H, HEADS, BM)
        d_keys, d_values = add_gradients(
            COLUMN, d_keys, d_values, keys, values, pk, q, do, norms, delta, base, cell, known, pq, None, None, True,
            k_count, window, sinks, unit, K, V, BK, BV, CAUSAL, CLOSE, False, DT, PRECISION,
        )  # fmt: skip
    base = (line * splits + split) * C
    store_cells(dk, d_keys * scale, base, x, x < C, K, BK)
    store_cells(dv, d_values, base, x, x < C, V, BV)
