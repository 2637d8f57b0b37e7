# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels of block selection share: where query blocks lie, and pooled tokens.

Unpacked, the first query of row b is at position positions[b * step], or Tk - Tq - starts[b] without `positions`;
queries at negative ones are padding. Packed sequences bring a table [5, blocks], as `place` returns it.

Shapes: B batch, Tq queries, Tk keys, M queries of a block, C channels of all heads, K those of one; BT and BC tiles.
"""

# The annotations of a kernel are read when it is defined: no `from __future__ import annotations` here.
import triton
import triton.language as tl

FAR = tl.constexpr(1 << 30)


@triton.jit
def place(r, b, layout, PACKED: tl.constexpr):
    """Of query blocks r: the first token (64-bit, of all rows), tokens, position of the first one, keys of the
    sequence, and its first key block among those of all sequences."""
    positions, step, starts, table, Tq, Tk, blocks, M = layout
    if PACKED:
        at = table + tl.minimum(r, blocks - 1)
        token, first = tl.load(at), tl.load(at + 4 * blocks).to(tl.int32)
        size = tl.where(r < blocks, tl.load(at + blocks), 0).to(tl.int32)
        position, length = tl.load(at + 2 * blocks).to(tl.int32), tl.load(at + 3 * blocks).to(tl.int32)
    else:
        begin = b * 0
        if starts is not None:
            begin = tl.load(starts + b).to(tl.int32)
        if positions is not None:
            at = tl.load(positions + b.to(tl.int64) * step)
            at = tl.minimum(tl.maximum(at, -FAR), FAR).to(tl.int32)
        else:
            at = Tk - Tq - begin
        skipped = tl.minimum(tl.maximum(-at, 0), Tq)
        token = b.to(tl.int64) * Tq + skipped + r * M
        size = tl.minimum(tl.maximum(Tq - skipped - r * M, 0), M)
        position, length, first = tl.maximum(at, 0) + r * M, r * 0 + Tk - begin, r * 0
    return token, size, position, length, first


@triton.jit(do_not_specialize=["step", "Tq", "Tk", "blocks", "M", "first", "count"])
def pool(
    x, out, positions, starts, table, step, Tq, Tk, blocks, M, first, count,
    C: tl.constexpr, K: tl.constexpr, BOUNDS: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of blocks `first` on, `count` of them: means [B, count, C], or the largest and smallest numbers of each head
    [B, count, C / K, 2 K]; zeros of blocks without tokens. A program for each block and tile of channels."""
    tiles: tl.constexpr = (C + BC - 1) // BC
    c, rest = tl.program_id(0) % tiles * BC + tl.arange(0, BC), tl.program_id(0) // tiles
    b = rest // count
    token, size, _, _, _ = place(first + rest % count, b, (positions, step, starts, table, Tq, Tk, blocks, M), PACKED)
    t = tl.arange(0, BT)
    source = x + token * C + t[:, None] * C + c[None, :]
    total = tl.zeros([BT, BC], tl.float32)
    high, low = tl.full([BT, BC], -float("inf"), tl.float32), tl.full([BT, BC], float("inf"), tl.float32)
    for begin in range(0, size, BT):
        seen = (begin + t < size)[:, None] & (c < C)[None, :]
        tile = tl.load(source + begin * C, mask=seen, other=0.0).to(tl.float32)
        if BOUNDS:
            high = tl.maximum(high, tl.where(seen, tile, -float("inf")))
            low = tl.minimum(low, tl.where(seen, tile, float("inf")))
        else:
            total += tile
    if BOUNDS:
        to = out + rest.to(tl.int64) * (2 * C) + (c // K) * (2 * K) + c % K
        tl.store(to, tl.where(size > 0, tl.max(high, 0), 0.0).to(out.dtype.element_ty), mask=c < C)
        tl.store(to + K, tl.where(size > 0, tl.min(low, 0), 0.0).to(out.dtype.element_ty), mask=c < C)
    else:
        mean = tl.sum(total, 0) / tl.maximum(size, 1).to(tl.float32)
        tl.store(out + rest.to(tl.int64) * C + c, mean.to(out.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["pieces", "size", "row"])
def extend(
    pooled, k, positions, pieces, size, row,
    H: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BK: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """Takes the key of each row at its position into the piece that holds it; a program for each row and head.
    k has `row` numbers from one row of the batch to the next."""
    head, b = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    at = tl.load(positions + b)
    piece, before = tl.maximum(at, 0) // size, (tl.maximum(at, 0) % size).to(tl.int32)
    c = tl.arange(0, BK)
    limit = tl.where((at >= 0) & (piece < pieces), K, 0)
    seen, old = c < limit, c < tl.where(before > 0, limit, 0)
    key = tl.load(k + b * row + head * K + c, mask=seen, other=0.0).to(tl.float32)
    width: tl.constexpr = K * (2 if SCORE == 1 else S)
    to = pooled + ((b * pieces + piece) * H + head) * width + c
    kind = pooled.dtype.element_ty
    if SCORE == 0:
        mean = tl.load(to, mask=old, other=0.0)
        tl.store(to, mean + (key - mean) / (before + 1).to(tl.float32), mask=seen)
    if SCORE == 1:
        high = tl.load(to, mask=old, other=-float("inf")).to(tl.float32)
        low = tl.load(to + K, mask=old, other=float("inf")).to(tl.float32)
        tl.store(to, tl.maximum(high, key).to(kind), mask=seen)
        tl.store(to + K, tl.minimum(low, key).to(kind), mask=seen)
    if SCORE == 2:
        tl.store(to + before * K, key.to(kind), mask=seen)
        for t in range(1, tl.where(before > 0, 1, S)):
            tl.store(to + t * K, (key * 0.0).to(kind), mask=seen)
