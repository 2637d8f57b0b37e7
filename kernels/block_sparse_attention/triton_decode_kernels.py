# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of decoding over listed blocks: a program attends a part of one list, a second launch merges parts.

    acc = sum exp2(s - top) v,  total = sum exp2(s - top),  o = sum over parts of 2^(norm - lse) acc / total

with scores s in units of log 2 and norm = top + log2(total) of a part. A query has a list of its own. A part is KEYS
keys: of listed blocks, padded to PAD keys each, or of columns, sink tokens and the window, of which each leaves a key
to the last that shows it. A program first writes down which tokens they are, then loads them.

Shapes: B batch, Tq queries, Tk keys, H query heads, G of them to a list, HS heads of the lists, S listed blocks, C
columns, K and V head widths, BK and BV their tiles; BM query heads and BN keys of a tile.
"""

import triton
import triton.language as tl

SIZES = ["Tq", "Tk", "HS", "kv_lists", "S", "C", "window", "near", "sinks", "parts", "listed", "row_stride",
         "kb", "kt", "kh", "vb", "vt", "vh"]  # fmt: skip
LOG2E = tl.constexpr(1.4426950408889634)
SCAN = tl.constexpr(64)  # entries looked at together


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
    blocks, part, count, length, BLOCK: tl.constexpr, PAD: tl.constexpr, KEYS: tl.constexpr, DISTINCT: tl.constexpr
):
    """Positions [KEYS] of a part's listed keys, and which are there."""
    PARTS: tl.constexpr = PAD // KEYS if PAD > KEYS else 1  # of a block
    ENTRIES: tl.constexpr = KEYS // PAD if PAD < KEYS else 1  # of a part
    first = part // PARTS * ENTRIES
    e = first + tl.arange(0, ENTRIES)
    x = tl.load(blocks + e, mask=e < count, other=-1)
    real = (x >= 0) & (x < tl.cdiv(length, BLOCK))
    x = tl.where(real, x, -1).to(tl.int32)
    if not DISTINCT:
        repeated = tl.zeros([ENTRIES], tl.int32)
        for begin in range(0, tl.minimum(first + ENTRIES, count), SCAN):
            at = begin + tl.arange(0, SCAN)
            earlier = tl.load(blocks + at, mask=at < count, other=-1)
            same = (earlier[None, :] == x[:, None]) & (at[None, :] < e[:, None])
            repeated = tl.maximum(repeated, tl.max(same.to(tl.int32), 1))
        real = real & (repeated == 0)
    offset = part % PARTS * KEYS + tl.arange(0, KEYS // ENTRIES)
    place = tl.maximum(x, 0)[:, None] * BLOCK + offset[None, :]
    there = real[:, None] & (offset < BLOCK)[None, :] & (place < length)
    return tl.reshape(place, [KEYS]), tl.reshape(there, [KEYS])


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
    begin = i * 0
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
    q, k, v, blocks, counts, columns, is_column, bias, q_positions, starts, tokens, o, norms,
    Tq, Tk, HS, kv_lists, S, C, window, near, sinks, parts, listed, row_stride, kb, kt, kh, vb, vt, vh, unit,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
    PAD: tl.constexpr, DISTINCT: tl.constexpr, CAUSAL: tl.constexpr, EXTRA: tl.constexpr, ALIGN: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """o [lists, parts, G, V] of each part alone, and its norm, in units of log 2; the first `listed` parts are those of
    listed blocks. tokens [programs, KEYS] is scratch.

    Programs: parts, then tiles of a list's query heads, then lists [B, HS, Tq]. Strides of keys and values count ALIGN
    numbers; kv_lists lists share a key head."""
    part, rest = tl.program_id(0) % parts, tl.program_id(0) // parts
    heads, rest = rest % tl.cdiv(G, BM) * BM + tl.arange(0, BM), rest // tl.cdiv(G, BM)
    i, hs, b = rest % Tq, rest // Tq % HS, (rest // Tq // HS).to(tl.int64)
    own, row, begin, length = own_place(q_positions, starts, b, i, Tq, Tk, row_stride)
    row = (b * HS + hs) * Tq + row
    count = rest * 0 + S
    if counts is not None:
        count = tl.minimum(tl.load(counts + row), S).to(tl.int32)
    if not EXTRA or part < listed:
        place, seen = listed_keys(blocks + row * S, part, count, length, BLOCK, PAD, KEYS, DISTINCT)
        if EXTRA:
            seen = seen & (place >= sinks) & (tl.abs(own - place) >= window)
            if is_column is not None:
                marks = is_column + (b * HS + hs) * Tk + begin
                seen = seen & (tl.load(marks + place, mask=seen, other=0) == 0)
        size = tl.minimum(count * PAD - part * KEYS, KEYS)
    else:
        n = (part - listed) * KEYS + tl.arange(0, KEYS)
        listing = columns
        if columns is not None:
            listing += (b * HS + hs) * C
        place, seen = other_keys(listing, n, own, C, sinks, near, window, length)
        size = tl.minimum(C + sinks + near - (part - listed) * KEYS, KEYS)
    if CAUSAL:
        seen = seen & (place <= own)
    tokens += tl.program_id(0).to(tl.int64) * KEYS
    tl.store(tokens + tl.arange(0, KEYS), tl.where(seen, place, -1))
    size = tl.where(own < 0, 0, size)
    column, value = tl.arange(0, BK), tl.arange(0, BV)
    first = ((b * Tq + i) * HS + hs) * G
    queries = tl.load(q + (first + heads[:, None]) * K + column[None, :],
                      mask=(heads < G)[:, None] & (column < K)[None, :], other=0.0).to(DT)  # fmt: skip
    k += (b * kb + begin.to(tl.int64) * kt + (hs // kv_lists).to(tl.int64) * kh) * ALIGN
    v += (b * vb + begin.to(tl.int64) * vt + (hs // kv_lists).to(tl.int64) * vh) * ALIGN
    acc = tl.zeros([BM, BV], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    tl.debug_barrier()  # the loads below read what other threads stored
    for tile in range(0, size, BN):
        n = tile + tl.arange(0, BN)
        at = tl.load(tokens + n)
        there = at >= 0
        at = tl.maximum(at, 0).to(tl.int64)
        keys = tl.load(k + at[:, None] * (kt * ALIGN) + column[None, :],
                       mask=there[:, None] & (column < K)[None, :], other=0.0).to(DT)  # fmt: skip
        values = tl.load(v + at[:, None] * (vt * ALIGN) + value[None, :],
                         mask=there[:, None] & (value < V)[None, :], other=0.0).to(DT)  # fmt: skip
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * unit
        if bias is not None:
            e = (part * KEYS + n) // PAD
            s += tl.load(bias + row * S + e, mask=there & (e < count), other=0.0)[None, :] * LOG2E
        s = tl.where(there[None, :], s, -float("inf"))
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
        there = (part < parts)[:, None] & (value < V)[None, :]
        x = tl.load(o + at[:, None] * V + value[None, :], mask=there, other=0.0)
        higher = tl.maximum(top, tl.max(norm, 0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        p, keep = tl.exp2(norm - safe), tl.exp2(top - safe)
        acc, total, top = acc * keep + tl.sum(x * p[:, None], 0), total * keep + tl.sum(p, 0), higher
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    row = ((b * Tq + i) * HS + hs) * G + g
    tl.store(out + row * V + value, (acc / total).to(out.dtype.element_ty), mask=value < V)
    tl.store(lse + row, tl.where(blind, -float("inf"), (top + tl.log2(total)) / LOG2E))
