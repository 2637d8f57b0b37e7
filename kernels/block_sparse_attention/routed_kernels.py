# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of attention whose every query and head lists key blocks of its own, key block by key block.

A pair is one entry of one list. Sorted by `bucket`, the key block and key head that it names, pairs that load the same
keys lie together: a program attends a tile of such queries to one block, and what a query's pairs give is merged:
    o = sum over pairs of w o_pair,  w = exp2(norm_pair - norm),  norm = log2 of sum over pairs of 2^norm_pair
    dq = scale sum over pairs of ds k,  dk = scale sum over a bucket's pairs of ds^T q,  dv = sum of p^T do
with p = exp2(unit q . k - norm), ds = p (do . v - delta), delta = rowsum(do * o) - dlse. Norms are in units of log 2.

Shapes: B batch, R lists of a head, S entries of a list, H query heads and HK key heads, of which `heads` key heads from
`head` on take part, with G query heads each; M key blocks of a row of the batch; P = B * heads * G * R * S pairs; K and
V head widths, BK and BV their tiles. Rows are those of q viewed as [B * Tq * H, K]; `spans` [B * M, 3] has the first
row of keys, number of keys and first position of each block.
"""

import triton
import triton.language as tl

from zoo.kernels.tiles import load_rows, store_rows

SIZES = ["R", "S", "Tq", "H", "HK", "head", "heads", "M", "pairs", "tiles", "buckets"]
LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(1 << 30)


# ---- pairs ------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=SIZES)
def assign(
    blocks, counts, places, firsts, lengths, out, R, S, H, head, heads, M, tiles, buckets,
    G: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The bucket of each pair, or `buckets` of one that is not read, repeated, or names keys that are not seen."""
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    h, b = rest % (heads * G), rest // (heads * G)
    r, s = tile * BR + tl.arange(0, BR), tl.arange(0, BS)
    row, known = b.to(tl.int64) * R + r, r < R
    place = tl.load(places + row, mask=known, other=-1)
    limit = tl.cdiv(tl.load(lengths + row, mask=known, other=0), BLOCK)
    if CAUSAL:
        limit = tl.minimum(limit, place // BLOCK + 1)
    row = (b.to(tl.int64) * H + head * G + h) * R + r
    count = r * 0 + S
    if counts is not None:
        count = tl.minimum(tl.load(counts + row, mask=known, other=0), S).to(tl.int32)
    x = tl.load(blocks + row[:, None] * S + s[None, :], mask=known[:, None] & (s < S)[None, :], other=-1)
    real = (x >= 0) & (x < limit[:, None]) & (place >= 0)[:, None] & (s[None, :] < count[:, None])
    for j in range(0, S - 1):
        earlier = tl.load(blocks + row * S + j, mask=known, other=-1)
        real = real & ((earlier[:, None] != x) | (s <= j)[None, :])
    own = (b * heads + h // G) * M + tl.load(firsts + b * R + r, mask=known, other=0)
    bucket = tl.where(real, own[:, None] + x.to(tl.int32), buckets)
    to = (rest.to(tl.int64) * R + r)[:, None] * S + s[None, :]
    tl.store(out + to, bucket, mask=known[:, None] & (s < S)[None, :])


@triton.jit(do_not_specialize=SIZES)
def resolve(
    order, begins, tokens, places, lse, delta, rows, own, norms, changes,
    R, S, Tq, H, head, heads, buckets, G: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Row, position and, for gradients, norm and delta of each pair in order."""
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    known = n < tl.load(begins + buckets)
    rest = tl.load(order + n, mask=known, other=0) // S
    r, rest = rest % R, rest // R
    h, b = rest % (heads * G), rest // (heads * G)
    row = (b * Tq + tl.load(tokens + b * R + r, mask=known, other=0)) * H + head * G + h
    tl.store(rows + n, row.to(tl.int32), mask=known)
    tl.store(own + n, tl.load(places + b * R + r, mask=known, other=0), mask=known)
    if lse is not None:
        norm = tl.load(lse + row, mask=known, other=0.0) * LOG2E
        tl.store(norms + n, tl.where(norm == -float("inf"), float("inf"), norm), mask=known)
        tl.store(changes + n, tl.load(delta + row, mask=known, other=0.0), mask=known)


@triton.jit
def key_block(spans, bucket, HK, head, heads, M):
    """First row of keys, of [B * Tk, HK, .], its key head, number of keys and first position."""
    at = spans + (bucket // (heads * M) * M + bucket % M) * 3
    return tl.load(at).to(tl.int64), head + bucket // M % heads, tl.load(at + 1), tl.load(at + 2)


@triton.jit
def gather_rows(x, row, known, D: tl.constexpr, BD: tl.constexpr):
    c = tl.arange(0, BD)
    return tl.load(x + row[:, None] * D + c[None, :], mask=known[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def tile_of_pairs(layout, rows, own, BM: tl.constexpr):
    """Of program's tile [BM]: bucket, places among the sorted pairs, which there are, their rows and positions."""
    at = layout + tl.program_id(0) * 3
    bucket, begin, count = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    known = tl.arange(0, BM) < count
    n = begin + tl.arange(0, BM)
    row = tl.load(rows + n, mask=known, other=0).to(tl.int64)
    return bucket, n, known, row, tl.load(own + n, mask=known, other=FAR)


@triton.jit
def reach(place, known, count, first, CAUSAL: tl.constexpr):
    """The last key that each query sees in its block; how many the tile does; how many all of it do."""
    if CAUSAL:
        last = place - first
        end = tl.minimum(tl.max(tl.where(known, last, -1), 0) + 1, count)
        whole = tl.minimum(tl.min(last, 0) + 1, count)
    else:
        last, end, whole = place * 0 + FAR, count, count
    return last, tl.where(tl.max(known.to(tl.int32), 0) > 0, end, 0), whole


# ---- forward ----------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=SIZES)
def pairs_forward(
    q, k, v, spans, layout, order, rows, own, o, norms, HK, head, heads, M, unit,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CAUSAL: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o [P, V] and norms [P] of each pair alone; a program for each tile of a bucket's pairs."""
    bucket, n, known, row, place = tile_of_pairs(layout, rows, own, BM)
    key_row, key_head, count, first = key_block(spans, bucket, HK, head, heads, M)
    last, end, whole = reach(place, known, count, first, CAUSAL)
    queries = gather_rows(q, row, known, K, BK).to(DT)
    k += (key_row * HK + key_head) * K
    v += (key_row * HK + key_head) * V
    acc = tl.zeros([BM, BV], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for j in range(0, end, BN):
        at = key_row * 0 + j
        keys = load_rows(k, at, count - j, HK * K, 0, K, BN, BK).to(DT)
        values = load_rows(v, at, count - j, HK * V, 0, V, BN, BV).to(DT)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if j + BN > whole:
            index = j + tl.arange(0, BN)
            seen = (index < count)[None, :] & (index[None, :] <= last[:, None])
            s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1) * unit)
        p, keep = tl.exp2(s * unit - higher[:, None]), tl.exp2(top - higher)
        total, top = total * keep + tl.sum(p, 1), higher
        acc = tl.dot(p.to(DT), values, acc * keep[:, None], input_precision=PRECISION)
    pair = tl.load(order + n, mask=known, other=0)
    total = tl.where(known, total, 1.0)  # of a tile without pairs
    tl.store(norms + pair, top + tl.log2(total), mask=known)
    c = tl.arange(0, BV)
    out = (acc / total[:, None]).to(o.dtype.element_ty)
    tl.store(o + pair[:, None] * V + c[None, :], out, mask=known[:, None] & (c < V)[None, :])


@triton.jit
def list_tile(tokens, places, R, S, Tq, H, head, heads, tiles, G: tl.constexpr, BR: tl.constexpr):
    """Of a program's lists [BR]: the first pair, the row, and whether it is a query's."""
    tile, rest = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    h, b = rest % (heads * G), rest // (heads * G)
    r = tile * BR + tl.arange(0, BR)
    known = tl.load(places + b * R + r, mask=r < R, other=-1) >= 0
    row = (b * Tq + tl.load(tokens + b * R + r, mask=known, other=0)) * H + head * G + h
    return (rest * R + r) * S, row, known


@triton.jit(do_not_specialize=SIZES)
def merge_outputs(
    parts, norms, bucket, tokens, places, o, lse, R, S, Tq, H, head, heads, tiles, buckets,
    G: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """o and lse of every list from those of its pairs."""
    pair, row, known = list_tile(tokens, places, R, S, Tq, H, head, heads, tiles, G, BR)
    c = tl.arange(0, BV)
    top = tl.full([BR], -float("inf"), tl.float32)
    for s in range(0, S):
        real = tl.load(bucket + pair + s, mask=known, other=buckets) < buckets
        top = tl.maximum(top, tl.load(norms + pair + s, mask=real, other=-float("inf")))
    safe = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, BV], tl.float32)
    for s in range(0, S):
        real = tl.load(bucket + pair + s, mask=known, other=buckets) < buckets
        weight = tl.exp2(tl.load(norms + pair + s, mask=real, other=-float("inf")) - safe)
        place = parts + (pair + s)[:, None] * V + c[None, :]
        acc += weight[:, None] * tl.load(place, mask=real[:, None] & (c < V)[None, :], other=0.0).to(tl.float32)
        total += weight
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    out = (acc / total[:, None]).to(o.dtype.element_ty)
    tl.store(o + row[:, None] * V + c[None, :], out, mask=known[:, None] & (c < V)[None, :])
    tl.store(lse + row, tl.where(blind, -float("inf"), (top + tl.log2(total)) / LOG2E), mask=known)


# ---- gradients --------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["count"])
def deltas(o, do, lse, dlse, delta, count, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr):
    """rowsum(do * o) - dlse, [count] rows; zero of a row that sees nothing."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    known = row < count
    x = gather_rows(o, row, known, V, BV).to(tl.float32) * gather_rows(do, row, known, V, BV).to(tl.float32)
    change = tl.sum(x, 1)
    if dlse is not None:
        change -= tl.load(dlse + row, mask=known, other=0.0)
    blind = tl.load(lse + row, mask=known, other=0.0) == -float("inf")
    tl.store(delta + row, tl.where(blind, 0.0, change), mask=known)


@triton.jit(do_not_specialize=SIZES)
def pairs_queries(
    q, k, v, do, spans, layout, order, rows, own, norms, changes, out, HK, head, heads, M, unit,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CAUSAL: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """ds k [P, K] of each pair; programs as in `pairs_forward`."""
    bucket, n, known, row, place = tile_of_pairs(layout, rows, own, BM)
    key_row, key_head, count, first = key_block(spans, bucket, HK, head, heads, M)
    last, end, whole = reach(place, known, count, first, CAUSAL)
    queries = gather_rows(q, row, known, K, BK).to(DT)
    grad = gather_rows(do, row, known, V, BV).to(DT)
    norm = tl.load(norms + n, mask=known, other=float("inf"))
    change = tl.load(changes + n, mask=known, other=0.0)
    k += (key_row * HK + key_head) * K
    v += (key_row * HK + key_head) * V
    acc = tl.zeros([BM, BK], tl.float32)
    for j in range(0, end, BN):
        at = key_row * 0 + j
        keys = load_rows(k, at, count - j, HK * K, 0, K, BN, BK).to(DT)
        values = load_rows(v, at, count - j, HK * V, 0, V, BN, BV).to(DT)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if j + BN > whole:
            index = j + tl.arange(0, BN)
            seen = (index < count)[None, :] & (index[None, :] <= last[:, None])
            s = tl.where(seen, s, -float("inf"))
        p = tl.exp2(s * unit - norm[:, None])
        dp = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        acc = tl.dot((p * (dp - change[:, None])).to(DT), keys, acc, input_precision=PRECISION)
    pair = tl.load(order + n, mask=known, other=0)
    c = tl.arange(0, BK)
    place = out + pair[:, None] * K + c[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=known[:, None] & (c < K)[None, :])


@triton.jit(do_not_specialize=SIZES)
def merge_queries(
    parts, bucket, tokens, places, dq, R, S, Tq, H, head, heads, tiles, buckets, scale,
    G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    pair, row, known = list_tile(tokens, places, R, S, Tq, H, head, heads, tiles, G, BR)
    c = tl.arange(0, BK)
    acc = tl.zeros([BR, BK], tl.float32)
    for s in range(0, S):
        real = tl.load(bucket + pair + s, mask=known, other=buckets) < buckets
        place = parts + (pair + s)[:, None] * K + c[None, :]
        acc += tl.load(place, mask=real[:, None] & (c < K)[None, :], other=0.0).to(tl.float32)
    out = (acc * scale).to(dq.dtype.element_ty)
    tl.store(dq + row[:, None] * K + c[None, :], out, mask=known[:, None] & (c < K)[None, :])


@triton.jit(do_not_specialize=SIZES)
def pairs_keys(
    q, k, v, do, spans, by_size, begins, rows, own, norms, changes, dk, dv, HK, head, heads, M, tiles, unit, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CAUSAL: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv; a program for each tile of a bucket's keys, the buckets with most pairs first."""
    tile, bucket = tl.program_id(0) % tiles, tl.load(by_size + tl.program_id(0) // tiles).to(tl.int32)
    key_row, key_head, count, first = key_block(spans, bucket, HK, head, heads, M)
    begin, end = tl.load(begins + bucket), tl.load(begins + bucket + 1)
    at, left = (tile * BN).to(tl.int64), count - tile * BN
    shift = key_row * HK + key_head
    keys = load_rows(k + shift * K, at, left, HK * K, 0, K, BN, BK).to(DT)
    values = load_rows(v + shift * V, at, left, HK * V, 0, V, BN, BV).to(DT)
    place = first + tile * BN + tl.arange(0, BN)
    d_keys = tl.zeros([BN, BK], tl.float32)
    d_values = tl.zeros([BN, BV], tl.float32)
    for i in range(begin, tl.where(left > 0, end, begin), BM):
        n = i + tl.arange(0, BM)
        row = tl.load(rows + n, mask=n < end, other=0).to(tl.int64)
        norm = tl.load(norms + n, mask=n < end, other=float("inf"))
        change = tl.load(changes + n, mask=n < end, other=0.0)
        queries = gather_rows(q, row, n < end, K, BK).to(DT)
        grad = gather_rows(do, row, n < end, V, BV).to(DT)
        s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        p = tl.exp2(s * unit - norm[None, :])
        if CAUSAL:
            last = tl.load(own + n, mask=n < end, other=-1)
            p = tl.where(place[:, None] <= last[None, :], p, 0.0)
        d_values = tl.dot(p.to(DT), grad, d_values, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(grad), input_precision=PRECISION)
        d_keys = tl.dot((p * (dp - change[None, :])).to(DT), queries, d_keys, input_precision=PRECISION)
    store_rows(dk + shift * K, d_keys * scale, at, left, HK * K, 0, K, BN, BK)
    store_rows(dv + shift * V, d_values, at, left, HK * V, 0, V, BN, BV)
