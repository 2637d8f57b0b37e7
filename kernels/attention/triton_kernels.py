# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of attention: one launch forward, two backward, no score ever in memory.

A raw score s is q . k, or tanh(inner q . k) under a softcap; `unit` s is the score in units of log 2. Then
    p = exp2(unit s - lse),  o = p v,  dp = do v^T,  ds = p (dp - delta),  delta = rowsum(do * o) - dlse,
    dq = scale ds k,  dk = scale ds^T q,  dv = p^T do;  under a softcap ds takes the factor 1 - s^2.
The gradient of the keys computes the transposed scores anew from loaded tiles: no accumulator is ever transposed.

Blocks that the mask excludes are not visited, and those that are seen whole need no mask. `mask` is (window, sinks,
chunk, stride, dilation), each None where there is none; key i of a sequence is at position i and query i at i + base,
unless POSITIONS are given.

Shapes: B batch, Tq and Tk tokens, H query heads, G query heads per key head, K and V head widths, BK and BV their
tiles; BM queries and BN keys per block; lse and delta [B, H, Tq].
"""

import triton
import triton.language as tl

from zoo.kernels.tiles import load_rows, store_rows

SIZES = ["Tq", "Tk", "H", "G", "tiles", "splits", "window", "sinks", "chunk", "stride", "dilation"]
PADDING = tl.constexpr(1 << 30)
SCAN = tl.constexpr(1024)  # given positions looked at together
LOG2E = tl.constexpr(1.4426950408889634)


# ---- which blocks, and what in them is seen ---------------------------------------------------------------------
@triton.jit
def floor_div(x, y):
    return tl.where(x >= 0, x // y, -((y - 1 - x) // y))


@triton.jit
def visible(pq, pk, mask, CAUSAL: tl.constexpr):
    """What `Mask.visible` says of positions that broadcast."""
    window, sinks, chunk, stride, dilation = mask
    seen = pk < PADDING
    if CAUSAL:
        seen = seen & (pk <= pq)
    near = seen
    if window is not None:
        near = near & (tl.abs(pq - pk) < window)
    if chunk is not None:
        near = near & (floor_div(pq, chunk) == floor_div(pk, chunk))
    if dilation is not None:
        near = near & ((pq - pk) % dilation == 0)
    if stride is not None:
        strided = (pq - pk) % stride == 0
        near = strided if window is None and chunk is None and dilation is None else near | strided
    if sinks is not None:
        near = near | (pk < sinks)
    return seen & near


@triton.jit
def positions(x, row, index, count, base, POSITIONS: tl.constexpr, BEYOND: tl.constexpr):
    """Those of tokens `index` of a sequence that begins at `row`; BEYOND after its end."""
    if POSITIONS:
        place = tl.load(x + row + index, mask=index < count, other=BEYOND)
        place = tl.minimum(tl.maximum(place, -PADDING), PADDING).to(tl.int32)
    else:
        place = tl.where(index < count, index + base, BEYOND)
    return place


@triton.jit
def visits(
    own, start, size, others, row, count, base, mask, CAUSAL: tl.constexpr, LATER: tl.constexpr,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The blocks that a tile of `size` tokens from position `start` on visits among `count` others from `base` on,
    keys, or LATER queries: first and end; first and end of those seen whole; how many before hold sink tokens."""
    window, sinks, chunk, stride, dilation = mask
    count = tl.where(size > 0, count, 0)
    first, end, high, leading = base, base + count, start + size - 1, count * 0
    whole, whole_end = first, end
    if POSITIONS:  # in any order: look at all of them
        start, high = tl.min(tl.where(own == -PADDING, PADDING, own), 0), tl.max(tl.where(own == PADDING, 0, own), 0)
        first, end, base = count, leading, leading
        for i in range(0, count, SCAN):
            index = i + tl.arange(0, SCAN)
            place = positions(others, row, index, count, 0, True, PADDING)
            seen = index < count
            if CAUSAL:
                seen = seen & ((place >= start) if LATER else (place <= high))
            if window is not None and sinks is None and stride is None:
                seen = seen & (start - place < window) & (place - high < window)
            first = tl.minimum(first, tl.min(tl.where(seen, index, count), 0))
            end = tl.maximum(end, tl.max(tl.where(seen, index + 1, 0), 0))
    elif CAUSAL:
        if LATER:
            first, whole = tl.maximum(first, start), tl.maximum(whole, high)
        else:
            end, whole_end = tl.minimum(end, high + 1), tl.minimum(whole_end, start + 1)
    if stride is None and not POSITIONS:
        if window is not None:
            first, end = tl.maximum(first, start - window + 1), tl.minimum(end, high + window)
            whole, whole_end = tl.maximum(whole, high - window + 1), tl.minimum(whole_end, start + window)
        if chunk is not None:
            low, top = floor_div(start, chunk) * chunk, floor_div(high, chunk) * chunk
            first, end = tl.maximum(first, low), tl.minimum(end, top + chunk)
            whole, whole_end = tl.maximum(whole, top), tl.minimum(whole_end, low + chunk)
        if sinks is not None and LATER:
            end = tl.where(start < sinks, base + count, end)
            if not CAUSAL:
                first = tl.where(start < sinks, base, first)
        elif sinks is not None:
            leading = tl.minimum(sinks, end)
    first = tl.maximum(first - base, 0) // BLOCK
    end = tl.maximum(first, tl.cdiv(tl.maximum(end - base, 0), BLOCK))
    whole, whole_end = tl.cdiv(tl.maximum(whole - base, 0), BLOCK), tl.maximum(whole_end - base, 0) // BLOCK
    if POSITIONS or stride is not None or dilation is not None:
        whole = end
    return first, end, whole, whole_end, tl.minimum(tl.cdiv(leading, BLOCK), first)


@triton.jit
def nth_block(i, blocks):
    """Of those that `visits` found, and whether it needs a mask."""
    first, end, whole, whole_end, leading = blocks
    block = tl.where(i < leading, i, first + i - leading)
    return block, (block < whole) | (block >= whole_end)


@triton.jit
def strip(b, tile, Tq, Tk, layout, PACKED: tl.constexpr, SIZE: tl.constexpr, OF_KEYS: tl.constexpr):
    """A tile's first token and number of tokens; first row and number of the queries and of the keys beside it."""
    starts, sizes, owners, cu_seqlens = layout
    if PACKED:
        n = tl.load(owners + tile)
        q_row = tl.load(cu_seqlens + n).to(tl.int64)
        q_count = (tl.load(cu_seqlens + n + 1) - q_row).to(tl.int32)
        k_row, k_count = q_row, q_count
        start = (tl.load(starts + tile) - q_row).to(tl.int32)
        own = tl.load(sizes + tile).to(tl.int32)
    else:
        q_row, k_row = b.to(tl.int64) * Tq, b.to(tl.int64) * Tk
        q_count, k_count, start = b * 0 + Tq, b * 0 + Tk, tile * SIZE
        own = tl.minimum((Tk if OF_KEYS else Tq) - start, SIZE)
    return start, own, q_row, k_row, q_count, k_count


# ---- tiles ------------------------------------------------------------------------------------------------------
@triton.jit
def raw_scores(
    x, y, px, py, masked, mask, inner, LATER: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[X, Y] of every row of x with every row of y, both as loaded; -inf where `masked` and not visible. Rows of x are
    queries and those of y keys, LATER the other way round; px and py are their positions."""
    s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    if SOFTCAP:
        s = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * inner * s))
    if masked:
        if LATER:
            s = tl.where(visible(py[None, :], px[:, None], mask, CAUSAL), s, -float("inf"))
        else:
            s = tl.where(visible(px[:, None], py[None, :], mask, CAUSAL), s, -float("inf"))
    return s


@triton.jit
def online_softmax(s, top, total, unit):
    """Weights of a tile of raw scores against the new maximum; the factor on what is summed so far; the new maximum
    and sum."""
    higher = tl.maximum(top, tl.max(s, 1) * unit)
    safe = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp2(s * unit - safe[:, None])
    keep = tl.exp2(top - safe)
    return p, keep, higher, total * keep + tl.sum(p, 1)


@triton.jit
def score_gradient(p, dp, delta, s, SOFTCAP: tl.constexpr):
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * tl.maximum(1.0 - s * s, 0.0)
    return ds


@triton.jit
def load_norm(lse, known):
    """In units of log 2. A row that sees nothing has no weights: against an infinite norm all of them are zero."""
    norm = tl.load(lse, mask=known, other=-float("inf")) * LOG2E
    return tl.where(norm == -float("inf"), float("inf"), norm)


@triton.jit(do_not_specialize=SIZES)
def forward(
    q, k, v, sink_logits, q_positions, k_positions, o, lse, starts, sizes, owners, cu_seqlens,
    Tq, Tk, H, G, tiles, splits, window, sinks, chunk, stride, dilation, inner, unit, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr, POSITIONS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries, those with most keys first, and query head."""
    mask, layout = (window, sinks, chunk, stride, dilation), (starts, sizes, owners, cu_seqlens)
    tile, rest = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, b = rest % H, rest // H
    start, own, q_row, k_row, q_count, k_count = strip(b, tile, Tq, Tk, layout, PACKED, BM, False)
    row, r, base = q_row + start, tl.arange(0, BM), k_count - q_count
    queries = load_rows(q + head * K, row, own, H * K, 0, K, BM, BK).to(DT)
    pq = positions(q_positions, q_row, start + r, q_count, base, POSITIONS, -PADDING)
    k += (k_row * (H // G) + head // G) * K
    v += (k_row * (H // G) + head // G) * V
    blocks = visits(pq, start + base, own, k_positions, k_row, k_count, 0, mask, CAUSAL, False, POSITIONS, BN)
    acc = tl.zeros([BM, BV], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for i in range(0, blocks[4] + blocks[1] - blocks[0]):
        block, masked = nth_block(i, blocks)
        at, left = (block * BN).to(tl.int64), k_count - block * BN
        keys = load_rows(k, at, left, (H // G) * K, 0, K, BN, BK).to(DT)
        values = load_rows(v, at, left, (H // G) * V, 0, V, BN, BV).to(DT)
        pk = positions(k_positions, k_row, block * BN + tl.arange(0, BN), k_count, 0, POSITIONS, PADDING)
        s = raw_scores(queries, keys, pq, pk, masked, mask, inner, False, CAUSAL, SOFTCAP, PRECISION)
        p, keep, top, total = online_softmax(s, top, total, unit)
        acc = tl.dot(p.to(DT), values, acc * keep[:, None], input_precision=PRECISION)
    blind = total == 0.0
    if sink_logits is not None:
        sink = tl.load(sink_logits + head) * LOG2E
        higher = tl.maximum(top, sink)
        keep = tl.exp2(top - higher)
        acc, total, top = acc * keep[:, None], total * keep + tl.exp2(sink - higher), higher
    total = tl.where(blind, 1.0, total)
    store_rows(o + head * V, acc / total[:, None], row, own, H * V, 0, V, BM, BV)
    norm = tl.where(blind, -float("inf"), (top + tl.log2(total)) / LOG2E)
    tl.store(lse + (b.to(tl.int64) * (H - 1) + head) * Tq + row + r, norm, mask=r < own)


@triton.jit(do_not_specialize=SIZES)
def query_gradients(
    q, k, v, q_positions, k_positions, o, lse, do, dlse, dq, delta, starts, sizes, owners, cu_seqlens,
    Tq, Tk, H, G, tiles, splits, window, sinks, chunk, stride, dilation, inner, unit, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr, POSITIONS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq and delta; programs as in `forward`."""
    mask, layout = (window, sinks, chunk, stride, dilation), (starts, sizes, owners, cu_seqlens)
    tile, rest = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, b = rest % H, rest // H
    start, own, q_row, k_row, q_count, k_count = strip(b, tile, Tq, Tk, layout, PACKED, BM, False)
    row, r, base = q_row + start, tl.arange(0, BM), k_count - q_count
    queries = load_rows(q + head * K, row, own, H * K, 0, K, BM, BK).to(DT)
    pq = positions(q_positions, q_row, start + r, q_count, base, POSITIONS, -PADDING)
    grad = load_rows(do + head * V, row, own, H * V, 0, V, BM, BV)
    out = load_rows(o + head * V, row, own, H * V, 0, V, BM, BV)
    change = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    grad = grad.to(DT)
    place = (b.to(tl.int64) * (H - 1) + head) * Tq + row + r
    if dlse is not None:
        change -= tl.load(dlse + place, mask=r < own, other=0.0)
    norm = load_norm(lse + place, r < own)
    change = tl.where(norm == float("inf"), 0.0, change)
    tl.store(delta + place, change, mask=r < own)
    k += (k_row * (H // G) + head // G) * K
    v += (k_row * (H // G) + head // G) * V
    blocks = visits(pq, start + base, own, k_positions, k_row, k_count, 0, mask, CAUSAL, False, POSITIONS, BN)
    acc = tl.zeros([BM, BK], tl.float32)
    for i in range(0, blocks[4] + blocks[1] - blocks[0]):
        block, masked = nth_block(i, blocks)
        at, left = (block * BN).to(tl.int64), k_count - block * BN
        keys = load_rows(k, at, left, (H // G) * K, 0, K, BN, BK).to(DT)
        values = load_rows(v, at, left, (H // G) * V, 0, V, BN, BV).to(DT)
        pk = positions(k_positions, k_row, block * BN + tl.arange(0, BN), k_count, 0, POSITIONS, PADDING)
        s = raw_scores(queries, keys, pq, pk, masked, mask, inner, False, CAUSAL, SOFTCAP, PRECISION)
        p = tl.exp2(s * unit - norm[:, None])
        dp = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        ds = score_gradient(p, dp, change[:, None], s, SOFTCAP)
        acc = tl.dot(ds.to(DT), keys, acc, input_precision=PRECISION)
    store_rows(dq + head * K, acc * scale, row, own, H * K, 0, K, BM, BK)


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
    q, k, v, q_positions, k_positions, lse, delta, do, dk, dv, starts, sizes, owners, cu_seqlens,
    Tq, Tk, H, G, tiles, splits, window, sinks, chunk, stride, dilation, inner, unit, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr, POSITIONS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, Tk, H / G * splits, ...]; one program per tile of keys and part of a key head's group."""
    mask, layout = (window, sinks, chunk, stride, dilation), (starts, sizes, owners, cu_seqlens)
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    heads = H // G * splits
    part, b = rest % heads, rest // heads
    start, own, q_row, k_row, q_count, k_count = strip(b, tile, Tq, Tk, layout, PACKED, BN, True)
    row, base = k_row + start, k_count - q_count
    keys = load_rows(k + part // splits * K, row, own, (H // G) * K, 0, K, BN, BK).to(DT)
    values = load_rows(v + part // splits * V, row, own, (H // G) * V, 0, V, BN, BV).to(DT)
    pk = positions(k_positions, k_row, start + tl.arange(0, BN), k_count, 0, POSITIONS, PADDING)
    blocks = visits(pk, start, own, q_positions, q_row, q_count, base, mask, CAUSAL, True, POSITIONS, BM)
    d_keys = tl.zeros([BN, BK], tl.float32)
    d_values = tl.zeros([BN, BV], tl.float32)
    count = blocks[4] + blocks[1] - blocks[0]
    # Heads and blocks in one loop: nested ones spill registers.
    for i in range(0, G // splits * count):
        head = part * (G // splits) + i // count
        block, masked = nth_block(i % count, blocks)
        at, left, index = q_row + block * BM, q_count - block * BM, block * BM + tl.arange(0, BM)
        queries = load_rows(q + head * K, at, left, H * K, 0, K, BM, BK).to(DT)
        grad = load_rows(do + head * V, at, left, H * V, 0, V, BM, BV).to(DT)
        place = (b.to(tl.int64) * (H - 1) + head) * Tq + at + tl.arange(0, BM)
        norm = load_norm(lse + place, index < q_count)
        change = tl.load(delta + place, mask=index < q_count, other=0.0)
        pq = positions(q_positions, q_row, index, q_count, base, POSITIONS, -PADDING)
        s = raw_scores(keys, queries, pk, pq, masked, mask, inner, True, CAUSAL, SOFTCAP, PRECISION)
        p = tl.exp2(s * unit - norm[None, :])
        d_values = tl.dot(p.to(DT), grad, d_values, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(grad), input_precision=PRECISION)
        ds = score_gradient(p, dp, change[None, :], s, SOFTCAP)
        d_keys = tl.dot(ds.to(DT), queries, d_keys, input_precision=PRECISION)
    store_rows(dk + part * K, d_keys * scale, row, own, heads * K, 0, K, BN, BK)
    store_rows(dv + part * V, d_values, row, own, heads * V, 0, V, BN, BV)
