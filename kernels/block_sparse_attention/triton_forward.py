# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of block-sparse attention with a program for each tile of queries: forward, and its gradient dq.

`unit` q . k is the score in units of log 2. Then, as in `zoo.kernels.attention.triton_kernels`,
    p = exp2(unit q . k - lse),  o = p v,  dp = do v^T,  ds = p (dp - delta),  delta = rowsum(do * o) - dlse,
    dq = scale ds k,  dbias = sum of ds over a block's keys and its queries
Shapes and tiles are those of `triton_tiles`. Programs with the most keys, those of the last query blocks, come first,
and those of one key head beside each other.
"""

import triton
import triton.language as tl

from zoo.kernels.attention.triton_kernels import LOG2E, load_norm, online_softmax
from zoo.kernels.block_sparse_attention.triton_tiles import (
    COLUMN,
    NEAR,
    PARTLY,
    WHOLE,
    keys_of,
    load_cells,
    load_keys,
    next_entry,
    nth,
    query_block_at,
    shown,
    store_cells,
    visits,
)

SIZES = ["Tq", "Tk", "B", "Nq", "S", "C", "window", "sinks"]


@triton.jit
def query_tile(layout, B, Nq, H: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr,
               BM: tl.constexpr):  # fmt: skip
    """Number of the tile among those of all heads, batch row, query block, sequence and first head; the first cell
    (64-bit) and [BM] further, which of them there are and their positions; tokens of the query block, position of the
    first; the keys' first row and number."""
    PARTS: tl.constexpr = (M * GROUP + BM - 1) // BM
    tile, rest = tl.program_id(0) % (H // GROUP * PARTS), tl.program_id(0) // (H // GROUP * PARTS)
    part, head = tile % PARTS, tile // PARTS * GROUP
    b, r = rest % B, Nq - 1 - rest // B
    n, row, count, at, k_row, k_count = query_block_at(b, r, layout, M, PACKED)
    x = part * BM + tl.arange(0, BM)
    token = x // GROUP
    known = token < count
    pq = tl.where(known, at + token, -1)
    base, cell = row.to(tl.int64) * H + head, token * H + x % GROUP
    return tile, b, r, n, head, base, cell, known, pq, count, at, k_row, k_count


@triton.jit
def tile_scores(
    KIND: tl.constexpr, queries, keys, pq, pk, k_count, is_column, bias, tile, window, sinks, unit, total,
    CAUSAL: tl.constexpr, CLOSE: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN] of q . k, -inf where not seen; with a bias in units of log 2. `is_column` and `bias` are those of the
    list, or None."""
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if bias is not None:
        s *= unit
    if bias is not None and KIND <= PARTLY:
        if BLOCK % BN == 0:
            s += tl.load(bias + tile // (BLOCK // BN)) * LOG2E
        else:
            x = tile * BN + tl.arange(0, BN)
            s += (tl.load(bias + x // BLOCK, mask=x < total * BLOCK, other=0.0) * LOG2E)[None, :]
    if KIND != WHOLE:
        flag = None
        if is_column is not None and KIND == PARTLY:
            flag = tl.load(is_column + pk, mask=pk < k_count, other=0)[None, :]
        seen = shown(KIND, pq[:, None], pk[None, :], k_count, flag, window, sinks, CAUSAL, CLOSE)
        s = tl.where(seen, s, -float("inf"))
    return s


@triton.jit(do_not_specialize=SIZES)
def forward(
    q, k, v, lists, meta, bias, columns, column_counts, is_column, o, lse,
    starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk, B, Nq, S, C, window, sinks, unit, scale,
    H: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    CLOSE: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """o and lse, [B, Tq, H]; one program per BM cells of a query block and GROUP heads."""
    layout = (starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk)
    part, b, r, n, head, base, cell, known, pq, count, at, k_row, k_count = query_tile(
        layout, B, Nq, H, M, GROUP, PACKED, BM
    )
    queries = load_cells(q, base, cell, known, K, BK).to(DT)
    own = head // (H // HS)
    line = (b * HS + own).to(tl.int64) * Nq + r
    lists += line * S
    meta += line * 3
    columns_at, is_column_at, bias_at = columns, is_column, bias
    if columns is not None:
        columns_at = columns + (n * HS + own).to(tl.int64) * C
        column_counts += n * HS + own
        is_column_at = is_column + (b * HS + own).to(tl.int64) * Tk + (k_row - b * Tk)
    if bias is not None:
        bias_at = bias + line * S
    total = tl.load(meta)
    k += k_row.to(tl.int64) * (HK * K) + head // (H // HK) * K
    v += k_row.to(tl.int64) * (HK * V) + head // (H // HK) * V
    acc = tl.zeros([BM, BV], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    for kind in tl.static_range(4):
        if kind == PARTLY or (kind == WHOLE and columns is None) or (kind == COLUMN and columns is not None) or (
            kind == NEAR and CLOSE
        ):  # fmt: skip
            number, edge, jump = visits(
                kind, meta, columns_at, column_counts, at, count, k_count, window, sinks, CAUSAL, BLOCK, BN
            )
            following = next_entry(kind, lists, 0, edge, jump, S, BLOCK, BN)
            for i in range(0, number):
                tile, entry = nth(i, edge, jump), following
                following = next_entry(kind, lists, i + 1, edge, jump, S, BLOCK, BN)
                start, x = keys_of(kind, tile, entry, lists, total, columns_at, column_counts, BLOCK, BN)
                left, pk = (k_count - start).to(tl.int32), (start + x).to(tl.int32)
                keys = load_keys(k, start, x, left, HK * K, kind != WHOLE, K, BK).to(DT)
                values = load_keys(v, start, x, left, HK * V, kind != WHOLE, V, BV).to(DT)
                s = tile_scores(kind, queries, keys, pq, pk, k_count, is_column_at, bias_at, tile, window, sinks, unit,
                                total, CAUSAL, CLOSE, BLOCK, BN, PRECISION)  # fmt: skip
                p, keep, top, norm = online_softmax(s, top, norm, unit if bias is None else 1.0)
                acc = tl.dot(p.to(DT), values, acc * keep[:, None], input_precision=PRECISION)
    blind = norm == 0.0
    norm = tl.where(blind, 1.0, norm)
    store_cells(o, acc / norm[:, None], base, cell, known, V, BV)
    tl.store(lse + base + cell, tl.where(blind, -float("inf"), (top + tl.log2(norm)) / LOG2E), mask=known)


@triton.jit(do_not_specialize=SIZES)
def query_gradients(
    q, k, v, lists, meta, bias, columns, column_counts, is_column, o, lse, do, dlse, dq, norms, delta, dbias,
    starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk, B, Nq, S, C, window, sinks, unit, scale,
    H: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    CLOSE: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dq; delta; norms, the lse in units of log 2 (inf where nothing is seen); dbias [B, TILES, Nq, S, SUMS] of each
    tile of keys, or of each key where a tile has several blocks. Programs as in `forward`."""
    layout = (starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk)
    part, b, r, n, head, base, cell, known, pq, count, at, k_row, k_count = query_tile(
        layout, B, Nq, H, M, GROUP, PACKED, BM
    )
    queries = load_cells(q, base, cell, known, K, BK).to(DT)
    grad = load_cells(do, base, cell, known, V, BV)
    change = tl.sum(grad.to(tl.float32) * load_cells(o, base, cell, known, V, BV).to(tl.float32), 1)
    grad = grad.to(DT)
    if dlse is not None:
        change -= tl.load(dlse + base + cell, mask=known, other=0.0)
    norm = load_norm(lse + base + cell, known)
    change = tl.where(norm == float("inf"), 0.0, change)
    tl.store(norms + base + cell, norm, mask=known)
    tl.store(delta + base + cell, change, mask=known)
    own = head // (H // HS)
    line = (b * HS + own).to(tl.int64) * Nq + r
    lists += line * S
    meta += line * 3
    columns_at, is_column_at, bias_at = columns, is_column, bias
    if columns is not None:
        columns_at = columns + (n * HS + own).to(tl.int64) * C
        column_counts += n * HS + own
        is_column_at = is_column + (b * HS + own).to(tl.int64) * Tk + (k_row - b * Tk)
    SUMS: tl.constexpr = BLOCK // BN if BLOCK % BN == 0 else BLOCK
    TILES: tl.constexpr = H // GROUP * ((M * GROUP + BM - 1) // BM)
    if bias is not None:
        bias_at = bias + line * S
        dbias += ((b * TILES + part).to(tl.int64) * Nq + r) * S * SUMS
    total = tl.load(meta)
    k += k_row.to(tl.int64) * (HK * K) + head // (H // HK) * K
    v += k_row.to(tl.int64) * (HK * V) + head // (H // HK) * V
    acc = tl.zeros([BM, BK], tl.float32)
    for kind in tl.static_range(4):
        if kind == PARTLY or (kind == WHOLE and columns is None) or (kind == COLUMN and columns is not None) or (
            kind == NEAR and CLOSE
        ):  # fmt: skip
            number, edge, jump = visits(
                kind, meta, columns_at, column_counts, at, count, k_count, window, sinks, CAUSAL, BLOCK, BN
            )
            following = next_entry(kind, lists, 0, edge, jump, S, BLOCK, BN)
            for i in range(0, number):
                tile, entry = nth(i, edge, jump), following
                following = next_entry(kind, lists, i + 1, edge, jump, S, BLOCK, BN)
                start, x = keys_of(kind, tile, entry, lists, total, columns_at, column_counts, BLOCK, BN)
                left, pk = (k_count - start).to(tl.int32), (start + x).to(tl.int32)
                keys = load_keys(k, start, x, left, HK * K, kind != WHOLE, K, BK).to(DT)
                values = load_keys(v, start, x, left, HK * V, kind != WHOLE, V, BV).to(DT)
                s = tile_scores(kind, queries, keys, pq, pk, k_count, is_column_at, bias_at, tile, window, sinks, unit,
                                total, CAUSAL, CLOSE, BLOCK, BN, PRECISION)  # fmt: skip
                dp = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
                ds = tl.exp2(s * (unit if bias is None else 1.0) - norm[:, None]) * (dp - change[:, None])
                if bias is not None and kind <= PARTLY:
                    if BLOCK % BN == 0:
                        tl.store(dbias + tile, tl.sum(tl.sum(ds, 1), 0))
                    else:
                        y = tile * BN + tl.arange(0, BN)
                        tl.store(dbias + y, tl.sum(ds, 0), mask=y < total * BLOCK)
                acc = tl.dot(ds.to(DT), keys, acc, input_precision=PRECISION)
    store_cells(dq, acc * scale, base, cell, known, K, BK)
