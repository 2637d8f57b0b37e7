# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels of block-sparse attention share: where tiles lie, which keys they look at, what is seen.

A tile of queries has the tokens of one query block times GROUP query heads that share a list, token by token; its rows
are cells, token * H + head. A query block looks at keys in up to four kinds of tiles, which `visits` counts:
    WHOLE    listed blocks that every query of the block sees completely: no mask
    PARTLY   the other listed blocks
    COLUMN   columns, BN of them together
    NEAR     tiles of the window and of the sink tokens
A key that is shown in several ways is left to the last of these; a listed key that is a column, too.

`layout` is (starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk): of padded batches the padding
before the first key and the position of the first query of each row, None where both are the default; of packed
sequences their bounds, the sequence of each query block and key block, and the first of both of each sequence.

Shapes: B batch, Tq and Tk tokens, H query heads, HK key heads, HS heads of the lists, Nq query blocks of M tokens, Nk
key blocks of BLOCK tokens, S entries of a list, C columns; BM cells and BN keys of a tile, K and V widths, BK and BV
their tiles.
"""

import triton
import triton.language as tl

WHOLE = tl.constexpr(0)
PARTLY = tl.constexpr(1)
COLUMN = tl.constexpr(2)
NEAR = tl.constexpr(3)
PADDING = tl.constexpr(1 << 30)  # a position that no key has
SCAN = tl.constexpr(1024)  # columns looked at together


# ---- where tokens lie -------------------------------------------------------------------------------------------
@triton.jit
def sequence_at(b, n, layout, PACKED: tl.constexpr):
    """Row of a sequence's first query that is no padding, number of these and position of the first one; row of its
    first key and number of keys."""
    starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk = layout
    if PACKED:
        q_row = tl.load(cu_seqlens + n).to(tl.int32)
        q_count = tl.load(cu_seqlens + n + 1).to(tl.int32) - q_row
        q_at, k_row, k_count = q_row * 0, q_row, q_count
    else:
        begin = b * 0
        if starts is not None:
            begin = tl.load(starts + b)
        first = Tk - Tq - begin
        if firsts is not None:
            first = tl.load(firsts + b)
        skipped = tl.minimum(tl.maximum(-first, 0), Tq)
        q_row, q_count, q_at = b * Tq + skipped, Tq - skipped, first + skipped
        k_row, k_count = b * Tk + begin, Tk - begin
    return q_row, q_count, q_at, k_row, k_count


@triton.jit
def query_block_at(b, r, layout, M: tl.constexpr, PACKED: tl.constexpr):
    """Sequence of query block r, its first row, number of queries and position of the first one; row of the sequence's
    first key and number of keys."""
    n, local = b, r
    if PACKED:
        n = tl.load(layout[3] + r)
        local = r - tl.load(layout[4] + n)
    q_row, q_count, q_at, k_row, k_count = sequence_at(b, n, layout, PACKED)
    index = local * M
    return n, q_row + index, tl.minimum(tl.maximum(q_count - index, 0), M), q_at + index, k_row, k_count


@triton.jit
def key_block_at(b, c, layout, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Sequence of key block c and position of its first key."""
    n, local = b, c
    if PACKED:
        n = tl.load(layout[5] + c)
        local = c - tl.load(layout[6] + n)
    return n, local * BLOCK


# ---- which keys a query block looks at --------------------------------------------------------------------------
@triton.jit
def visits(
    KIND: tl.constexpr, meta, columns, column_count, at, count, k_count, window, sinks, CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Number of tiles of a kind; of number i, and those from `edge` on jump further, as `tile + jump`."""
    last = at + count - 1
    if KIND <= PARTLY:
        total, first, end = tl.load(meta), tl.load(meta + 1), tl.load(meta + 2)
        first, end = tl.cdiv(first * BLOCK, BN), end * BLOCK // BN
        end = tl.maximum(first, end)
        if KIND == WHOLE:
            number, edge, jump = end - first, first * 0, first
        else:
            number, edge, jump = tl.cdiv(total * BLOCK, BN) - (end - first), first, end - first
    elif KIND == COLUMN:
        used = tl.load(column_count)
        if CAUSAL:
            seen = used * 0
            for i in range(0, used, SCAN):
                x = i + tl.arange(0, SCAN)
                seen += tl.sum((tl.load(columns + x, mask=x < used, other=PADDING) <= last).to(tl.int32), 0)
            used = seen
        number = tl.where(count > 0, tl.cdiv(used, BN), 0)
        edge, jump = number, number * 0
    else:
        stop = tl.minimum(last + 1, k_count) if CAUSAL else k_count
        first = tl.maximum(at - window + 1, 0) // BN
        end = tl.minimum(last + (1 if CAUSAL else window), k_count)
        end = tl.maximum(tl.where(window > 0, tl.cdiv(end, BN), 0), first)
        edge = tl.minimum(tl.cdiv(tl.minimum(sinks, stop), BN), tl.where(window > 0, first, PADDING))
        number, jump = tl.where(count > 0, edge + tl.where(window > 0, end - first, 0), 0), first - edge
    return number, edge, jump


@triton.jit
def nth(i, edge, jump):
    return i + tl.where(i < edge, 0, jump)


@triton.jit
def next_entry(KIND: tl.constexpr, lists, i, edge, jump, S, BLOCK: tl.constexpr, BN: tl.constexpr):
    """The listed block of tile i, where a tile has one block; read one tile ahead, so that nothing waits for it."""
    if KIND <= PARTLY and BLOCK % BN == 0:
        return tl.load(lists + tl.minimum(nth(i, edge, jump) // (BLOCK // BN), S - 1))
    return tl.full([], 0, tl.int32)


@triton.jit
def keys_of(KIND: tl.constexpr, tile, entry, lists, total, columns, column_count, BLOCK: tl.constexpr,
            BN: tl.constexpr):  # fmt: skip
    """Positions of a tile's keys as a common one (64-bit) and [BN] further, which may be PADDING and more."""
    r = tl.arange(0, BN)
    if KIND == NEAR:
        start = (tile * BN).to(tl.int64)
    elif KIND == COLUMN:
        x = tile * BN + r
        start = (tile * 0).to(tl.int64)
        r = tl.load(columns + x, mask=x < tl.load(column_count), other=PADDING).to(tl.int64)
    elif BLOCK % BN == 0:
        start = entry.to(tl.int64) * BLOCK + tile % (BLOCK // BN) * BN
    else:
        x = tile * BN + r
        start = (tile * 0).to(tl.int64)
        c = tl.load(lists + x // BLOCK, mask=x < total * BLOCK, other=0)
        r = tl.where(x < total * BLOCK, c * BLOCK + x % BLOCK, PADDING).to(tl.int64)
    return start, r


@triton.jit
def shown(
    KIND: tl.constexpr, pq, pk, k_count, is_column, window, sinks, CAUSAL: tl.constexpr, CLOSE: tl.constexpr
):  # fmt: skip
    """Whether queries at pq see keys at pk in a way; positions and `is_column` (a byte, or None) broadcast."""
    seen = pk < k_count
    if CAUSAL:
        seen = seen & (pk <= pq)
    if CLOSE:
        near = (tl.abs(pq - pk) < window) | (pk < sinks)
        seen = seen & (near if KIND == NEAR else near == 0)
    if KIND <= PARTLY and is_column is not None:
        seen = seen & (is_column == 0)
    return seen


# ---- tiles ------------------------------------------------------------------------------------------------------
@triton.jit
def load_cells(x, base, cell, known, D: tl.constexpr, BD: tl.constexpr):
    """[., BD] of rows base (64-bit) + cell of an array of width D; zero where not known."""
    c = tl.arange(0, BD)
    place = x + base * D + (cell[:, None] * D + c[None, :])
    inside = known[:, None] if BD == D else known[:, None] & (c < D)[None, :]
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def store_cells(x, value, base, cell, known, D: tl.constexpr, BD: tl.constexpr):
    c = tl.arange(0, BD)
    place = x + base * D + (cell[:, None] * D + c[None, :])
    inside = known[:, None] if BD == D else known[:, None] & (c < D)[None, :]
    tl.store(place, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_keys(x, start, r, left, stride: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """[BN, BD] of rows start + r that are less than start + left; all of them are, unless MASKED."""
    c = tl.arange(0, BD)
    place = x + start * stride + (r[:, None] * stride + c[None, :])
    if MASKED and BD != D:
        return tl.load(place, mask=(r < left)[:, None] & (c < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(place, mask=(r < left)[:, None], other=0.0)
    if BD != D:
        return tl.load(place, mask=(c < D)[None, :], other=0.0)
    return tl.load(place)


# ---- lists ------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["rows", "HS", "Nq", "S", "Tq", "Tk", "window", "sinks"])
def tidy(
    blocks, order, tidied, places, meta, starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk,
    rows, HS, Nq, S, window, sinks, M: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Of sorted lists [rows, S] the blocks with keys that are left to the list, once each; where they were; and how
    many they are, the first one and the end of those seen whole."""
    layout = (starts, firsts, cu_seqlens, q_owners, q_firsts, k_owners, k_firsts, Tq, Tk)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    known, row = row < rows, tl.minimum(row, rows - 1)
    _, _, count, at, _, k_count = query_block_at(row // Nq // HS, row % Nq, layout, M, PACKED)
    last, limit = at + count - 1, k_count
    if CAUSAL or window > 0:
        limit = tl.minimum(limit, at + 1 - window)
    if COLUMNS:
        limit = limit * 0
    line = row.to(tl.int64)[:, None] * S
    total, leading, whole = row * 0, row * 0, row * 0
    for i in range(0, S, BS):
        s = i + tl.arange(0, BS)[None, :]
        inside = known[:, None] & (s < S)
        c = tl.load(blocks + line + s, mask=inside, other=-1)
        before = tl.load(blocks + line + s - 1, mask=inside & (s > 0), other=-1)
        kept = (c >= 0) & (c != before) & (c < tl.cdiv(k_count, BLOCK)[:, None]) & (count > 0)[:, None]
        start = tl.where(kept, c, 0) * BLOCK
        if CAUSAL:
            kept = kept & (start <= last[:, None])
            close = last[:, None] - start < window
        else:
            close = (last[:, None] - start < window) & (start + (BLOCK - 1) - at[:, None] < window)
        kept = kept & (start + BLOCK > sinks) & (close == 0)
        ones = kept.to(tl.int32)
        to = line + (tl.cumsum(ones, 1) - 1 + total[:, None])
        tl.store(tidied + to, c, mask=kept)
        if places is not None:
            tl.store(places + to, tl.load(order + line + s, mask=kept, other=0), mask=kept)
        total += tl.sum(ones, 1)
        leading += tl.sum((kept & (start < sinks)).to(tl.int32), 1)
        whole += tl.sum((kept & (start >= sinks) & (start + BLOCK <= limit[:, None])).to(tl.int32), 1)
    tl.store(meta + row * 3, total, mask=known)
    tl.store(meta + row * 3 + 1, leading, mask=known)
    tl.store(meta + row * 3 + 2, leading + whole, mask=known)
