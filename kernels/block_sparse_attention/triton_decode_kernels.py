# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of decoding over listed blocks: a program attends a part of one list, a second launch merges parts.

    acc = sum exp2(s - top) v,  total = sum exp2(s - top),  o = sum over parts of 2^(norm - lse) acc / total

with scores s in units of log 2 and norm = top + log2(total) of a part. A query has a list of its own. Its keys are laid
out as tiles of BN: those of the listed blocks, padded to PAD keys each, then columns, sink tokens and the window, of
which each leaves a key to the last that shows it.

Shapes: B batch, Tq queries, Tk keys, H query heads, G of them to a list, HS heads of the lists, S listed blocks, C
columns, K and V head widths, BK and BV their tiles; BM query heads and BN keys of a tile.
"""

import triton
import triton.language as tl

SIZES = ["Tq", "Tk", "H", "HS", "kv_lists", "S", "C", "window", "near", "sinks", "parts", "tiles", "each", "row_stride",
         "kb", "kt", "kh", "vb", "vt", "vh"]  # fmt: skip
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["S", "blocks_there"])
def distinct(blocks, counts, marks, out, S, blocks_there, N: tl.constexpr):
    """Lists with only the first of repeated entries and -1 for all that is not read; marks [lists, blocks_there].

    The smallest place of each number is found by an integer minimum in memory, the same in any order."""
    n = tl.program_id(0).to(tl.int64)
    count = n * 0 + S
    if counts is not None:
        count = tl.minimum(tl.load(counts + n).to(tl.int64), S)
    blocks += n * S
    marks += n * blocks_there
    for begin in range(0, S, N):
        at = begin + tl.arange(0, N)
        x = tl.load(blocks + at, mask=at < count, other=-1)
        tl.store(marks + x, at * 0 + S, mask=(x >= 0) & (x < blocks_there))
    tl.debug_barrier()
    for begin in range(0, S, N):
        at = begin + tl.arange(0, N)
        x = tl.load(blocks + at, mask=at < count, other=-1)
        tl.atomic_min(marks + x, at, mask=(x >= 0) & (x < blocks_there), sem="relaxed")
    tl.debug_barrier()
    for begin in range(0, S, N):
        at = begin + tl.arange(0, N)
        x = tl.load(blocks + at, mask=at < count, other=-1)
        real = (x >= 0) & (x < blocks_there)
        first = tl.load(marks + x, mask=real, other=-1, volatile=True)
        tl.store(out + n * S + at, tl.where(real & (first == at), x, -1).to(tl.int32), mask=at < S)


@triton.jit
def listed_keys(
    blocks, bias, tile, earlier, count, S, length, BLOCK: tl.constexpr, PAD: tl.constexpr, SB: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Positions [BN] of a tile's listed keys, which are there, and their bias in units of log 2."""
    TILES: tl.constexpr = PAD // BN if PAD > BN else 1  # of a block
    ENTRIES: tl.constexpr = BN // PAD if PAD < BN else 1  # of a tile
    WIDTH: tl.constexpr = BN // ENTRIES
    e = tile // TILES * ENTRIES + tl.arange(0, ENTRIES)
    x = tl.load(blocks + e, mask=e < count, other=-1)
    real = (x >= 0) & (x < tl.cdiv(length, BLOCK))
    x = x.to(tl.int32)
    if SB:
        before = (earlier[None, :] == x[:, None]) & (tl.arange(0, SB)[None, :] < e[:, None])
        real = real & (tl.sum(before.to(tl.int32), 1) == 0)
    offset = tile % TILES * BN + tl.arange(0, WIDTH)
    place = tl.where(real, x, 0)[:, None] * BLOCK + offset[None, :]
    there = real[:, None] & (offset < BLOCK)[None, :] & (place < length)
    if bias is not None:
        shift = tl.load(bias + e, mask=real, other=0.0).to(tl.float32) * LOG2E
        shift = tl.reshape(tl.broadcast_to(shift[:, None], [ENTRIES, WIDTH]), [BN])
    else:
        shift = tl.full([BN], 0.0, tl.float32)
    return tl.reshape(place, [BN]), tl.reshape(there, [BN]), shift


@triton.jit
def other_keys(columns, n, own, C, sinks, near, window, length):
    """Positions of the n-th of columns, sink tokens and window keys, and which are left to their way."""
    place = tl.where(n < C + sinks, n - C, tl.maximum(own - window + 1, 0) + n - C - sinks)
    there = (n >= 0) & (n < C + sinks + near)
    if columns is not None:
        column = tl.load(columns + n, mask=(n >= 0) & (n < C), other=-1)
        there = there & ((n >= C) | ((column >= sinks) & (column < length)))
        place = tl.where(n < C, tl.where(there, column, -1).to(tl.int32), place)
    in_window = tl.abs(own - place) < window
    return place, there & (in_window == (n >= C + sinks)) & (place >= 0) & (place < length)


@triton.jit
def own_place(q_positions, starts, b, i, Tq, Tk, row_stride):
    """Position of query i, the number of its list, first key and number of keys of row b. Lists begin with the first
    query that is no padding."""
    begin = b * 0
    if starts is not None:
        begin = tl.load(starts + b).to(tl.int32)
    if q_positions is not None:
        first = tl.load(q_positions + b * row_stride).to(tl.int32)
    else:
        first = Tk - Tq - begin
    own = first + i
    return own, tl.maximum(i - tl.maximum(-first, 0), 0), begin, Tk - begin


@triton.jit(do_not_specialize=SIZES)
def parts_forward(
    q, k, v, blocks, counts, columns, is_column, bias, q_positions, starts, o, norms,
    Tq, Tk, H, HS, kv_lists, S, C, window, near, sinks, parts, tiles, each, row_stride, kb, kt, kh, vb, vt, vh, unit,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
    PAD: tl.constexpr, SB: tl.constexpr, CAUSAL: tl.constexpr, EXTRA: tl.constexpr, ALIGN: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o [lists, parts, G, V] of each part alone, and its norm, in units of log 2; `each` tiles of the keys to a part.

    Programs: parts, then tiles of a list's query heads, then lists [B, HS, Tq]. Strides of keys and values count ALIGN
    numbers; kv_lists lists share a key head."""
    part, rest = tl.program_id(0) % parts, tl.program_id(0) // parts
    heads, rest = rest % tl.cdiv(G, BM) * BM + tl.arange(0, BM), rest // tl.cdiv(G, BM)
    i, hs, b = rest % Tq, rest // Tq % HS, rest // Tq // HS
    own, row, begin, length = own_place(q_positions, starts, b, i, Tq, Tk, row_stride)
    row = ((b * HS + hs) * Tq + row).to(tl.int64)
    count = b * 0 + S
    if counts is not None:
        count = tl.minimum(tl.load(counts + row), S).to(tl.int32)
    blocks += row * S
    if bias is not None:
        bias += row * S
    if columns is not None:
        columns += (b * HS + hs).to(tl.int64) * C
        is_column += (b * HS + hs).to(tl.int64) * Tk + begin
    earlier = tl.arange(0, SB) if SB else 0
    if SB:
        earlier = tl.load(blocks + earlier, mask=earlier < count, other=-1).to(tl.int32)
    column, value = tl.arange(0, BK), tl.arange(0, BV)
    first = (b.to(tl.int64) * Tq + i) * H + hs * G
    queries = tl.load(q + (first + heads[:, None]) * K + column[None, :],
                      mask=(heads < G)[:, None] & (column < K)[None, :], other=0.0).to(DT)  # fmt: skip
    k += (b.to(tl.int64) * kb + begin.to(tl.int64) * kt + (hs // kv_lists).to(tl.int64) * kh) * ALIGN
    v += (b.to(tl.int64) * vb + begin.to(tl.int64) * vt + (hs // kv_lists).to(tl.int64) * vh) * ALIGN
    last = part * each + each
    if EXTRA:
        last = tl.minimum(last, tiles + tl.cdiv(C + sinks + near, BN))
    else:
        held = tl.cdiv(count, BN // PAD) if PAD < BN else count * (PAD // BN)
        last = tl.minimum(last, held)
    last = tl.where(own < 0, 0, last)
    acc = tl.zeros([BM, BV], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for tile in range(part * each, last):
        place, seen, shift = listed_keys(blocks, bias, tile, earlier, count, S, length, BLOCK, PAD, SB, BN)
        if EXTRA:
            other = (tile - tiles) * BN + tl.arange(0, BN)
            listed = other < 0
            seen = seen & listed & (place >= sinks) & (tl.abs(own - place) >= window)
            if is_column is not None:
                seen = seen & (tl.load(is_column + place, mask=seen, other=0) == 0)
            other, left = other_keys(columns, other, own, C, sinks, near, window, length)
            place, seen, shift = tl.where(listed, place, other), seen | left, tl.where(listed, shift, 0.0)
        if CAUSAL:
            seen = seen & (place <= own)
        at = tl.where(seen, place, 0).to(tl.int64)
        keys = tl.load(k + at[:, None] * (kt * ALIGN) + column[None, :],
                       mask=seen[:, None] & (column < K)[None, :], other=0.0).to(DT)  # fmt: skip
        values = tl.load(v + at[:, None] * (vt * ALIGN) + value[None, :],
                         mask=seen[:, None] & (value < V)[None, :], other=0.0).to(DT)  # fmt: skip
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * unit + shift[None, :]
        s = tl.where(seen[None, :], s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        p, keep = tl.exp2(s - safe[:, None]), tl.exp2(top - safe)
        top, total = higher, total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(DT), values, acc * keep[:, None], input_precision=PRECISION)
    out = (rest.to(tl.int64) * parts + part) * G + heads
    norm = tl.where(total == 0.0, -float("inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(norms + out, norm, mask=heads < G)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(o + out[:, None] * V + value[None, :], acc, mask=(heads < G)[:, None] & (value < V)[None, :])


@triton.jit(do_not_specialize=["Tq", "HS", "parts"])
def merge(o, norms, out, lse, Tq, HS, parts, G: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr):
    """out [B, Tq, H, V] and lse [B, Tq, H] of all parts; a program for each list and query head."""
    g, rest = tl.program_id(0) % G, tl.program_id(0) // G
    i, hs, b = rest % Tq, rest // Tq % HS, (rest // Tq // HS).to(tl.int64)
    value = tl.arange(0, BV)
    acc = tl.zeros([BV], tl.float32)
    top, total = tl.full([], -float("inf"), tl.float32), tl.full([], 0.0, tl.float32)
    for begin in range(0, parts, BN):
        part = begin + tl.arange(0, BN)
        at = (rest.to(tl.int64) * parts + part) * G + g
        norm = tl.load(norms + at, mask=part < parts, other=-float("inf"))
        x = tl.load(o + at[:, None] * V + value[None, :], mask=(part < parts)[:, None] & (value < V)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(norm, 0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        p, keep = tl.exp2(norm - safe), tl.exp2(top - safe)
        acc, total, top = acc * keep + tl.sum(x * p[:, None], 0), total * keep + tl.sum(p, 0), higher
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    row = ((b * Tq + i) * HS + hs) * G + g
    tl.store(out + row * V + value, (acc / total).to(out.dtype.element_ty), mask=value < V)
    tl.store(lse + row, tl.where(blind, -float("inf"), (top + tl.log2(total)) / LOG2E))
