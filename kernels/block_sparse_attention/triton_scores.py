# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that estimate what query blocks want of key blocks; the formulas are in `scores`.

    estimates     one launch: scores of all query heads, of "bounds" the largest of a block's queries
    antidiagonal  per tile of pooled queries and keys up to the diagonal the row maxima, the rows' sums of
                  exp2(score - maximum), and the same sums by key block
    combine       puts the tiles of a row together and sums the rows of a query block, and the heads of a key head

Scores of what `place` and causality exclude are not written.

Shapes: B batch, Tq queries, Tk keys, H query heads, G of them per key head, K head width in tiles of BK; query blocks
`first` on, `count` of them, of M queries; n pieces of pooled keys; BM rows of queries, BN columns of keys.
"""

# The annotations of a kernel are read when it is defined: no `from __future__ import annotations` here.
import triton
import triton.language as tl

from zoo.kernels.block_sparse_attention.triton_place import FAR, place

SIZES = ["step", "Tq", "Tk", "blocks", "M", "block", "first", "count", "pieces", "width", "tiles", "rows"]


@triton.jit
def load_tile(x, row, known, column, K: tl.constexpr, BK: tl.constexpr):
    """[rows, BK] from `column` on, of rows of K numbers that begin at `row`, a 64-bit offset."""
    c = column + tl.arange(0, BK)
    seen = known[:, None] if K % BK == 0 else known[:, None] & (c < K)[None, :]
    return tl.load(x + row[:, None] + c[None, :], mask=seen, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def estimates(
    q, pooled, scores, positions, starts, table, step, Tq, Tk, blocks, M, block, first, count, pieces, width, tiles,
    factor,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, MP: tl.constexpr, CAUSAL: tl.constexpr,
    BOUNDS: tl.constexpr, POOLED: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[B, H, count, width]. q is [B, Tq, H, K], or with POOLED [B, count, H, K]. A row is a query block and head; its
    MP places (a power of two) are its queries."""
    NB: tl.constexpr = BM // MP
    head, rest = tl.program_id(0) % (H // G), tl.program_id(0) // (H // G)
    column, rest = rest % tiles * BN, rest // tiles
    units = tl.cdiv(count * G, NB)
    unit, b = rest % units * NB, rest // units
    slot, u = tl.arange(0, BM) % MP, unit + tl.arange(0, BM) // MP
    layout = (positions, step, starts, table, Tq, Tk, blocks, M)
    token, size, position, length, start = place(first + u // G, b, layout, PACKED)
    live = (u < count * G) & (size > 0)
    bound = position // block if CAUSAL else tl.cdiv(length, block)  # own blocks are not scored
    low = tl.min(tl.where(live, start, FAR), 0)
    high = tl.max(tl.where(live, start + bound, 0), 0)
    if (column < high) & (column + BN > low):
        known = live & (slot < size)
        at = b.to(tl.int64) * count + u // G if POOLED else token + slot
        own = (at * H + head * G + u % G) * K
        c = column + tl.arange(0, BN)
        row = ((b.to(tl.int64) * pieces + c) * (H // G) + head) * (2 * K if BOUNDS else K)
        s = tl.zeros([BM, BN], tl.float32)
        for d in range(0, K, BK):
            queries = load_tile(q, own, known, d, K, BK)
            keys = load_tile(pooled, row, c < pieces, d, K, BK).to(DT)
            if BOUNDS:
                least = load_tile(pooled, row + K, c < pieces, d, K, BK).to(DT)
                queries = queries.to(tl.float32)
                s = tl.dot(tl.minimum(queries, 0.0).to(DT), tl.trans(least), s, input_precision=PRECISION)
                queries = tl.maximum(queries, 0.0)
            s = tl.dot(queries.to(DT), tl.trans(keys), s, input_precision=PRECISION)
        if MP > 1:
            s = tl.max(tl.reshape(tl.where(known[:, None], s, -float("inf")), [NB, MP, BN]), 1)
        line = unit + tl.arange(0, NB)
        to = ((b * H + head * G + line % G).to(tl.int64) * count + line // G) * width
        inside = (line < count * G)[:, None] & (c < width)[None, :]
        tl.store(scores + to[:, None] + c[None, :], s * factor, mask=inside)


@triton.jit
def place_row(i, b, layout, block, first, count, S: tl.constexpr, P: tl.constexpr, CAUSAL: tl.constexpr,
              PACKED: tl.constexpr):  # fmt: skip
    """Of row i, S queries: the first token, tokens, position of the last one, keys of the sequence, its first block,
    and how many blocks the row sees (of the last one perhaps a part)."""
    token, size, position, length, start = place(first + i // P, b, layout, PACKED)
    begin = i % P * S
    have = tl.where(i < count * P, tl.minimum(tl.maximum(size - begin, 0), S), 0)
    last = position + begin + have - 1
    bound = tl.cdiv(length, block)
    if CAUSAL:
        bound = tl.minimum(bound, last // block + 1)
    return token + begin, have, last, length, start, tl.where(have > 0, bound, 0)


@triton.jit
def place_pieces(column, b, starts, spans, blocks, Tk, block, S: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
                 PACKED: tl.constexpr):  # fmt: skip
    """Of the columns from `column` on: block, place in the block, first token (64-bit) and tokens from it on. A block
    takes EP columns, a power of two. Packed sequences bring `spans` [2, blocks], first token and tokens."""
    j = column + tl.arange(0, BN)
    c, offset = j // EP, j % EP * S
    if PACKED:
        at = spans + tl.minimum(c, blocks - 1)
        token, left = tl.load(at) + offset, tl.load(at + blocks).to(tl.int32) - offset
    else:
        begin = b * 0
        if starts is not None:
            begin = tl.load(starts + b).to(tl.int32)
        token = b.to(tl.int64) * Tk + begin + c * block + offset
        left = Tk - begin - c * block - offset
    return c, offset, token, tl.where(c < blocks, left, 0)


@triton.jit(do_not_specialize=[*SIZES, "spread"])
def antidiagonal(
    q, k, sums, tops, positions, starts, table, spans, step, Tq, Tk, blocks, M, block, first, count, pieces, width,
    tiles, spread, unit,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, EP: tl.constexpr,
    POOLED: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """sums [B, H, count P, width] and tops [2, B, H, count P, tiles], maxima and sums of the row; `spread` apart. With
    POOLED k is [B, n, H / G, S K]. A program for each tile of rows and columns; GROUP tiles of rows, of all heads that
    share keys, read the same tile of keys at about the same time."""
    lines = tl.cdiv(count * P, BM) * G
    rest, pid = tl.program_id(0) // (lines * tiles), tl.program_id(0) % (lines * tiles)
    base = pid // (GROUP * tiles) * GROUP
    side = tl.minimum(lines - base, GROUP)
    line, tile = base + pid % (GROUP * tiles) % side, pid % (GROUP * tiles) // side
    head, b = rest % (H // G) * G + line % G, rest // (H // G)
    i = line // G * BM + tl.arange(0, BM)
    layout = (positions, step, starts, table, Tq, Tk, blocks, M)
    token, have, last, length, start, bound = place_row(i, b, layout, block, first, count, S, P, CAUSAL, PACKED)
    BT: tl.constexpr = BN // EP  # blocks of a tile
    low, high = tl.min(tl.where(bound > 0, start, FAR), 0), tl.max(tl.where(bound > 0, start + bound, 0), 0)
    if (tile * BT < high) & (tile * BT + BT > low):
        c, offset, key, left = place_pieces(tile * BN, b, starts, spans, width, Tk, block, S, EP, BN, PACKED)
        left = tl.where(offset < block, left, 0)
        x = q + (token * H + head) * K
        if POOLED:
            y = k + ((b.to(tl.int64) * pieces + c * (block // S) + offset // S) * (H // G) + head // G) * (S * K)
        else:
            y = k + (key * (H // G) + head // G) * K
        STEP: tl.constexpr = K if POOLED else (H // G) * K
        CK: tl.constexpr = (K + BK - 1) // BK
        d = tl.arange(0, BK)
        s = tl.zeros([BM, BN], tl.float32)
        for n in range(0, S * CK):
            t, column = n // CK, n % CK * BK
            rows, columns = (S - 1 - t < have)[:, None], (t < left)[:, None]
            if K % BK != 0:
                rows, columns = rows & (column + d < K)[None, :], columns & (column + d < K)[None, :]
            queries = tl.load(x[:, None] + ((S - 1 - t) * (H * K) + column) + d[None, :], mask=rows, other=0.0)
            keys = tl.load(y[:, None] + (t * STEP + column) + d[None, :], mask=columns, other=0.0)
            s = tl.dot(queries.to(DT), tl.trans(keys.to(DT)), s, input_precision=PRECISION)
        s *= unit
        edge = tl.min(tl.where(have > 0, tl.minimum(last, length - 1), -1), 0)
        if PACKED or (tl.max(tl.where(offset < block, c * block + offset, FAR), 0) > edge):
            at = (c[None, :] - start[:, None]) * block + offset[None, :]
            seen = (left > 0)[None, :] & (have > 0)[:, None] & (at >= 0) & (at < length[:, None])
            if CAUSAL:
                seen = seen & (at <= last[:, None])
            s = tl.where(seen, s, -float("inf"))
        top = tl.max(s, 1)
        s = tl.exp2(s - tl.where(top == -float("inf"), 0.0, top)[:, None])
        if EP > 1:
            s = tl.sum(tl.reshape(s, [BM, BT, EP]), 2)
        row = (b * H + head).to(tl.int64) * (count * P) + i
        c = tile * BT + tl.arange(0, BT)
        inside = (i < count * P)[:, None] & (c < width)[None, :]
        tl.store(sums + row[:, None] * width + c[None, :], s, mask=inside)
        tl.store(tops + row * tiles + tile, top, mask=i < count * P)
        tl.store(tops + spread + row * tiles + tile, tl.sum(s, 1), mask=i < count * P)


@triton.jit(do_not_specialize=[*SIZES, "spread"])
def combine(
    sums, tops, weights, positions, starts, table, step, Tq, Tk, blocks, M, block, first, count, width, tiles, spread,
    HS: tl.constexpr, G: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """[B, HS, count, width], means over the G query heads of a list; BT blocks of a tile. A program for each query
    block and list."""
    r, rest = tl.program_id(0) % count, tl.program_id(0) // count
    j, b = tl.arange(0, ROWS), rest // HS
    g, i = j // P, r * P + j % P
    layout = (positions, step, starts, table, Tq, Tk, blocks, M)
    _, have, _, _, start, bound = place_row(i, b, layout, block, first, count, S, P, CAUSAL, PACKED)
    bound = tl.where(g < G, bound, 0)
    row = ((b * HS + rest % HS) * G + g).to(tl.int64) * (count * P) + i
    top, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    begin, end = tl.min(tl.where(bound > 0, start, FAR), 0), tl.max(tl.where(bound > 0, start + bound, 0), 0)
    for at in range(begin // BT, tl.cdiv(end, BT), BC):
        t = at + tl.arange(0, BC)[None, :]
        seen = (bound > 0)[:, None] & (t * BT < (start + bound)[:, None]) & (t * BT + BT > start[:, None])
        place_of = tops + row[:, None] * tiles + t
        tile = tl.load(place_of, mask=seen, other=-float("inf"))
        part = tl.load(place_of + spread, mask=seen, other=0.0)
        higher = tl.maximum(top, tl.max(tile, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(top - safe) + tl.sum(part * tl.exp2(tile - safe[:, None]), 1)
        top = higher
    top = tl.where(top == -float("inf"), 0.0, top)
    share = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0) / G
    to = weights + rest.to(tl.int64) * count * width + r.to(tl.int64) * width
    for at in range(begin, end, BC):
        c = at + tl.arange(0, BC)[None, :]
        seen = (c >= start[:, None]) & (c < (start + bound)[:, None])
        part = tl.load(sums + row[:, None] * width + c, mask=seen, other=0.0)
        tile = tl.load(tops + row[:, None] * tiles + c // BT, mask=seen, other=-float("inf"))
        weight = tl.sum(part * tl.exp2(tile - top[:, None]) * share[:, None], 0)
        tl.store(to + at + tl.arange(0, BC), weight, mask=at + tl.arange(0, BC) < end)
