# mypy: disable-error-code="no-untyped-def"
"""Loads, stores and decay factors that the Triton kernels share.

Shapes: B batch, T tokens, C tokens of a chunk, H key heads, HV value heads, K and V head widths, BK and BV tiles of
them; rows are the B * T tokens, and a chunk is `count` rows from `row` on. Row numbers are 64-bit, and every address
is made from one; offsets inside a tile are 32-bit, as registers are few.
"""

# The annotations of a kernel are read when it is defined: no `from __future__ import annotations` here.
import triton
import triton.language as tl


@triton.jit
def chunk_rows(chunk, length, chunks, starts, counts, C: tl.constexpr, PACKED: tl.constexpr):
    """First row and number of tokens of a chunk; packed sequences bring them in `starts` and `counts`."""
    if PACKED:
        row = tl.load(starts + chunk).to(tl.int64)
        count = tl.load(counts + chunk).to(tl.int32)
    else:
        begin = (chunk % chunks) * C
        row = (chunk // chunks).to(tl.int64) * length + begin
        count = tl.minimum(length - begin, C)
    return row, count


@triton.jit
def sequence_rows(n, length, chunks, cu_seqlens, first_chunk, PACKED: tl.constexpr):
    """First row, number of tokens and first chunk of sequence n."""
    if PACKED:
        row = tl.load(cu_seqlens + n).to(tl.int64)
        size = (tl.load(cu_seqlens + n + 1).to(tl.int64) - row).to(tl.int32)
        chunk = tl.load(first_chunk + n).to(tl.int64)
    else:
        row = n.to(tl.int64) * length
        size = n * 0 + length
        chunk = n.to(tl.int64) * chunks
    return row, size, chunk


@triton.jit
def chunk_offset(i, size, C: tl.constexpr):
    """i * C, for the chunks of a loop. The bound, which never acts, hides from LLVM that the number grows evenly:
    strength reduction would keep 64-bit registers for every address in the loop."""
    return tl.minimum(i * C, size - 1)


@triton.jit
def _inside(r, count, c, D: tl.constexpr, BD: tl.constexpr):
    """Mask of a tile; columns need none where tiles, which begin at multiples of BD, fill D."""
    return (r < count)[:, None] if D % BD == 0 else (r < count)[:, None] & (c < D)[None, :]


@triton.jit
def _place(x, r, c, stride, BD: tl.constexpr):
    """Addresses of a tile. Where the stride is a constant, rows are split so that those of one thread differ by known
    numbers: one address per tile stays in registers."""
    S: tl.constexpr = (8 if BD >= 128 else 16) if isinstance(stride, int) else 1 << 20
    return x + ((r % S)[:, None] * stride + c[None, :]) + (r // S * S)[:, None] * stride


@triton.jit
def load_rows(x, row, count, stride, column, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """[C, BD] from `column` on, zero beyond `count` rows and D columns."""
    r = tl.arange(0, C)
    c = column + tl.arange(0, BD)
    place = _place(x + row * stride, r, c, stride, BD)
    return tl.load(place, mask=_inside(r, count, c, D, BD), other=0.0)


@triton.jit
def store_rows(x, value, row, count, stride, column, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    r = tl.arange(0, C)
    c = column + tl.arange(0, BD)
    place = _place(x + row * stride, r, c, stride, BD)
    tl.store(place, value.to(x.dtype.element_ty), mask=_inside(r, count, c, D, BD))


@triton.jit
def load_state(x, number, count, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """[BK, BV] of state `number` (64-bit) in an array of [K, V]; that of an empty chunk was never written."""
    r = tl.arange(0, BK)
    c = column + tl.arange(0, BV)
    place = x + number * (K * V) + (r[:, None] * V + c[None, :])
    return tl.load(place, mask=((r < K) & (r * 0 < count))[:, None] & (c < V)[None, :], other=0.0)


@triton.jit
def store_state(x, value, number, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    r = tl.arange(0, BK)
    c = column + tl.arange(0, BV)
    place = x + number * (K * V) + (r[:, None] * V + c[None, :])
    tl.store(place, value.to(x.dtype.element_ty), mask=(r < K)[:, None] & (c < V)[None, :])


@triton.jit
def load_gate(x, row, count, heads, head, C: tl.constexpr):
    """[C] of one number per token and head."""
    r = tl.arange(0, C)
    return tl.load(x + (row + r) * heads + head, mask=r < count, other=0.0)


@triton.jit
def load_sums(sums, row, count, heads, head, C: tl.constexpr, DECAY: tl.constexpr):
    """Running sums of the log decays of a chunk and their last one, in fp64: their differences keep fp32 accuracy."""
    if DECAY:
        r = tl.arange(0, C)
        place = sums + (row + r) * heads + head
        last = tl.load(sums + (row + count - 1) * heads + head, mask=count > 0, other=0.0)
        # Rows beyond the chunk decay no further: every factor stays finite.
        sum = tl.where(r < count, tl.load(place, mask=r < count, other=0.0), last)
    else:
        last = tl.full([], 0.0, tl.float32)
        sum = tl.full([C], 0.0, tl.float32)
    return sum, last


@triton.jit
def decay_between(sum, count, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[i, j] (TRANSPOSED: [j, i]) of the decay from token j to token i, for j <= i; zero elsewhere."""
    r = tl.arange(0, C)
    if TRANSPOSED:
        i, j, gap = r[None, :], r[:, None], sum[None, :] - sum[:, None]
    else:
        i, j, gap = r[:, None], r[None, :], sum[:, None] - sum[None, :]
    seen = (i >= j) & (i < count)
    return tl.where(seen, tl.exp(tl.where(seen, gap.to(tl.float32), 0.0)), 0.0)


# ---- elementwise recurrences: a program for each tile of D, segment of T and sequence, as `vector` divides them ------
SEGMENTS = ["length", "segment", "segments", "tiles"]


@triton.jit
def affine(keep1, add1, keep2, add2):
    """One map s -> keep s + add after another."""
    return keep1 * keep2, keep2 * add1 + add2


@triton.jit
def row_of(x, r, row):
    """One row of a tile; r numbers its rows."""
    return tl.sum(tl.where(r == row, x, 0.0), 0)


@triton.jit
def place_segment(cu_seqlens, first_chunk, length, chunks, segment, segments, tiles, BD: tl.constexpr,
                  PACKED: tl.constexpr):  # fmt: skip
    """Channels [BD], sequence, its first row, number of tokens and first chunk, the segment's number, begin and end,
    and [BD] if it is the sequence's last one with tokens, or the first one of none."""
    pid = tl.program_id(0)
    c = (pid % tiles) * BD + tl.arange(0, BD)
    s, n = pid // tiles % segments, (pid // tiles // segments).to(tl.int64)
    row, size, chunk = sequence_rows(n, length, chunks, cu_seqlens, first_chunk, PACKED)
    owner = c * 0 + s == tl.maximum(tl.cdiv(size, segment), 1) - 1
    return c, n, row, size, chunk, s, s * segment, tl.minimum((s + 1) * segment, size), owner
