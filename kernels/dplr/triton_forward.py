# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of diagonal-plus-low-rank transitions, forward: two launches.

Every token reads the state through r and writes u to it through b, a second time v through k:
    dplr: u_i = r_i S, with r = a before the decay of token i;
    delta (DELTA): u_i = v_i + r_i S with r = -k after it, b = beta k, and no second write.
Inside a chunk, with A the scores of reads on earlier writes, u = (I - A)^-1 x = x + Z x, and x is linear in the state
that enters and in v: u = W S_0 + M v with M = (I + Z) (r.k), or I + Z for delta, and so
    o = (q_start + (q.b) W) S_0 + Q v,    Q = q.k + (q.b) M,
    S_1 = exp(decay) S_0 + b_end^T (W S_0) + E^T v,    E = k_end + M^T b_end.
`prepare` makes all these factors, which are free of the state, and sums that cancel are added before anything is
rounded; `scan` runs over the chunks, one product waiting for another.

Scores hold the decay between two tokens, per channel. Where a chunk decays little, it factors into exponents of both
signs, at half of the chunk's. Elsewhere scores come level by level: between the two halves of each block of 2, 4, .. C
tokens the decay factors at the border, into exponents that are never positive.

Shapes: as in tiles; sums [B, T, HV, K], of log decays in the chunk; norms [B, T, HV, 2], of q and k; squares
[B, T, HV, SQUARES C], of I + Z, Q and for dplr M and (q.b) (I + Z); factors [B, T, HV, 4 K], of W, what reads S_0,
b_end and E; entering [chunks, HV, V, K], transposed states; crossing [borders, HV, V + K, K], transposed states at the
ends of segments above the transitions of segments.
"""

import triton
import triton.language as tl

from zoo.kernels.delta_rule.triton_kernels import _segment
from zoo.kernels.tiles import chunk_offset, chunk_rows, load_gate, load_rows, load_state, store_rows, store_state

# K and V give the alignment of every address; other numbers would only multiply the compilations.
SIZES = ["length", "chunks", "tile_count", "segment", "segments"]


@triton.jit
def load_at(x, row, index, valid, stride, column, D: tl.constexpr, BD: tl.constexpr):
    """[C, BD] of the rows at `index`, zero where not `valid`."""
    c = column + tl.arange(0, BD)
    place = x + (row + index)[:, None] * stride + c[None, :]
    return tl.load(place, mask=valid[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def decay_of(gap):
    """Rows beyond the sequence would have positive exponents."""
    return tl.exp(tl.minimum(gap.to(tl.float32), 0.0))


@triton.jit
def load_sides(
    inputs, row, count, H, HV, head, column, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
    DELTA: tl.constexpr,
):  # fmt: skip
    """[C, BK] in fp32 of q, k, r and b."""
    q, k, a, b, beta, norms = inputs
    base = head // (HV // H) * K
    query = load_rows(q + base, row, count, H * K, column, K, C, BK).to(tl.float32)
    key = load_rows(k + base, row, count, H * K, column, K, C, BK).to(tl.float32)
    if NORM:
        query *= load_gate(norms, row, count, 2 * HV, 2 * head, C)[:, None]
        key *= load_gate(norms, row, count, 2 * HV, 2 * head + 1, C)[:, None]
    if DELTA:
        read = -key
        write = key * load_gate(beta, row, count, HV, head, C)[:, None]
    else:
        read = load_rows(a + base, row, count, H * K, column, K, C, BK).to(tl.float32)
        write = load_rows(b + base, row, count, H * K, column, K, C, BK).to(tl.float32)
    return query, key, read, write


@triton.jit
def load_last(sums, row, count, stride, column, K: tl.constexpr, BK: tl.constexpr):
    """[BK] of the sums over the chunk."""
    c = column + tl.arange(0, BK)
    return tl.load(sums + (row + count - 1) * stride + c, mask=(c < K) & (c * 0 < count), other=0.0)


@triton.jit
def load_sums(
    sums, row, count, stride, column, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr
):
    """[C, BK] of the sums that q and those that r has met."""
    r = tl.arange(0, C)
    sum = load_rows(sums, row, count, stride, column, K, C, BK)
    if DELTA:
        met = sum
    else:
        met = load_at(sums, row, r - 1, (r > 0) & (r < count), stride, column, K, BK)
    return sum, met


@triton.jit
def mild_decays(sum, met, last, DELTA: tl.constexpr):
    """Decays from half of that of the chunk to q and to r, and from k and b to it, for all pairs of tokens."""
    near = tl.exp((sum - last * 0.5).to(tl.float32))
    met_near = near if DELTA else tl.exp((met - last * 0.5).to(tl.float32))
    return near, met_near, tl.exp((last * 0.5 - sum).to(tl.float32))


@triton.jit
def level_decays(
    sums, sum, met, row, count, stride, column, level, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    DELTA: tl.constexpr,
):  # fmt: skip
    """Decays from the border inside each block of 2 << level tokens, between its halves, to q and to r, and from k and
    b to it; and the [C, C] pairs of tokens that meet there. Level -1 are the pairs of tokens with themselves."""
    r = tl.arange(0, C)
    half = r >> tl.maximum(level, 0)
    border = (half | 1) * (1 << tl.maximum(level, 0)) - 1
    after = (half & 1 == 1)[:, None]
    middle = load_at(sums, row, border, border < count, stride, column, K, BK)
    near = tl.where(level < 0, 1.0, tl.where(after, decay_of(sum - middle), 0.0))
    met_near = near if DELTA else tl.where(after, decay_of(met - middle), 0.0)
    far = tl.where(level < 0, 1.0, tl.where(after, 0.0, decay_of(middle - sum)))
    most = tl.where(level < 0, 0, 1)
    return near, met_near, far, (r[:, None] >= r[None, :]) & ((half[:, None] ^ half[None, :]) <= most)


@triton.jit
def split(x, DT: tl.constexpr):
    """Two bf16 numbers that hold twice the digits of one. To cut is cheaper than to round."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(DT), (x - high).to(DT)


@triton.jit
def _prefix_sums(
    q, k, decay, sums, norms, row, count, H, HV, head, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    DT: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Log decays are bounded below where exp is zero anyway, so that -1e4 does not swamp the digits of the others."""
    r = tl.arange(0, C)
    base = head // (HV // H) * K
    WIDTH: tl.constexpr = K if PER_CHANNEL else 1
    q_square = tl.zeros([C], tl.float32)
    k_square = tl.zeros([C], tl.float32)
    for column in range(0, K, BK):
        c = column + tl.arange(0, BK)
        inside = (r < count)[:, None] & (c < K)[None, :]
        step = tl.zeros([C, BK], tl.float32)
        if DECAY:
            place = (decay + head * WIDTH + ((row + r) * HV * WIDTH * PER_TOKEN))[:, None] + (c * PER_CHANNEL)[None, :]
            step = tl.maximum(tl.load(place, mask=inside, other=0.0), -120.0)
        if DT == tl.bfloat16:  # noqa: SIM300
            high, low = split(step, DT)
            below = tl.where(r[:, None] >= r[None, :], 1.0, 0.0).to(DT)
            sum = tl.dot(below, low, acc=tl.dot(below, high))
        else:
            sum = tl.cumsum(step.to(sums.dtype.element_ty), 0)
        store_rows(sums + head * K, sum, row, count, HV * K, column, K, C, BK)
        if NORM:
            query = load_rows(q + base, row, count, H * K, column, K, C, BK).to(tl.float32)
            key = load_rows(k + base, row, count, H * K, column, K, C, BK).to(tl.float32)
            q_square += tl.sum(query * query, 1)
            k_square += tl.sum(key * key, 1)
    if NORM:
        place = norms + ((row + r) * HV + head) * 2
        tl.store(place, tl.rsqrt(q_square + 1e-6), mask=r < count)
        tl.store(place + 1, tl.rsqrt(k_square + 1e-6), mask=r < count)
    tl.debug_barrier()  # all threads of the program read what each has stored


@triton.jit
def _add_scores(by_q, by_r, query, read, write, seen, PRECISION: tl.constexpr):
    by_q += tl.where(seen, tl.dot(query, tl.trans(write), input_precision=PRECISION), 0.0)
    return by_q, by_r + tl.where(seen, tl.dot(read, tl.trans(write), input_precision=PRECISION), 0.0)


@triton.jit
def _scores(
    inputs, sums, factors, row, count, H, HV, head, limit, K: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr,
    DELTA: tl.constexpr,
):  # fmt: skip
    """Of q and of r on b, and on k: at once where the chunk decays little, or level by level. And, into `factors`, q
    and r with the decays from the chunk's start and b and k with those to its end, or all from and to its half."""
    q_b = tl.zeros([C, C], tl.float32)
    r_b = tl.zeros([C, C], tl.float32)
    q_k = tl.zeros([C, C], tl.float32)
    r_k = tl.zeros([C, C], tl.float32)
    for column in range(0, K, BK):
        last = load_last(sums, row, count, HV * K, column, K, BK)[None, :]
        query, key, read, write = load_sides(inputs, row, count, H, HV, head, column, K, C, BK, NORM, DELTA)
        sum, met = load_sums(sums, row, count, HV * K, column, K, C, BK, DELTA)
        mild = tl.min(last) >= -limit
        if mild:
            near, met_near, far = mild_decays(sum, met, last, DELTA)
            by_query, by_read, by_write = (query * near).to(DT), (read * met_near).to(DT), (write * far).to(DT)
            by_key = by_write if DELTA else (key * far).to(DT)
        else:
            for level in range(-1, LEVELS):
                # The same row, which no compiler knows: to load again beats to hold in registers.
                again = row + (level + 1 >> 8)
                query, key, read, write = load_sides(inputs, again, count, H, HV, head, column, K, C, BK, NORM, DELTA)
                sum, met = load_sums(sums, again, count, HV * K, column, K, C, BK, DELTA)
                near, met_near, far, seen = level_decays(
                    sums, sum, met, row, count, HV * K, column, level, K, C, BK, DELTA
                )
                left, read_left, right = (query * near).to(DT), (read * met_near).to(DT), (write * far).to(DT)
                q_b, r_b = _add_scores(q_b, r_b, left, read_left, right, seen, PRECISION)
                if not DELTA:
                    q_k, r_k = _add_scores(q_k, r_k, left, read_left, (key * far).to(DT), seen, PRECISION)
            to_end = decay_of(last - sum)
            by_query, by_read = (query * decay_of(sum)).to(DT), (read * decay_of(met)).to(DT)
            by_write = (write * to_end).to(DT)
            by_key = by_write if DELTA else (key * to_end).to(DT)
        store_rows(factors, by_read, row, count, HV * 4 * K, column, K, C, BK)
        store_rows(factors + K, by_query, row, count, HV * 4 * K, column, K, C, BK)
        store_rows(factors + 2 * K, by_write, row, count, HV * 4 * K, column, K, C, BK)
        if not DELTA:
            store_rows(factors + 3 * K, by_key, row, count, HV * 4 * K, column, K, C, BK)
        if mild:  # apart, or the factors would be computed once more in the layout of an operand
            q_b = tl.dot(by_query, tl.trans(by_write), acc=q_b, input_precision=PRECISION)
            r_b = tl.dot(by_read, tl.trans(by_write), acc=r_b, input_precision=PRECISION)
            if not DELTA:
                q_k = tl.dot(by_query, tl.trans(by_key), acc=q_k, input_precision=PRECISION)
                r_k = tl.dot(by_read, tl.trans(by_key), acc=r_k, input_precision=PRECISION)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return tl.where(i >= j, q_b, 0.0), tl.where(i > j, r_b, 0.0), tl.where(i >= j, q_k, 0.0), tl.where(i > j, r_k, 0.0)


@triton.jit(do_not_specialize=SIZES[:2])
def prepare(
    q, k, a, b, beta, decay, sums, norms, squares, factors, starts, counts, length, chunks, scale, limit,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NORM: tl.constexpr, DELTA: tl.constexpr,
    DECAY: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """One program per chunk and value head."""
    SQUARES: tl.constexpr = 2 if DELTA else 4
    chunk = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    row, count = chunk_rows(chunk, length, chunks, starts, counts, C, PACKED)
    _prefix_sums(q, k, decay, sums, norms, row, count, H, HV, head, K, C, BK, DT, PER_TOKEN, PER_CHANNEL, DECAY, NORM)
    sums += head * K
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]

    inputs = (q, k, a, b, beta, norms)
    factors += head * 4 * K
    q_b, r_b, q_k, r_k = _scores(
        inputs, sums, factors, row, count, H, HV, head, limit, K, C, LEVELS, BK, DT, PRECISION, NORM, DELTA
    )
    squares += head * SQUARES * C
    stride = HV * SQUARES * C
    if not DELTA:  # they wait in memory, as registers are few
        store_rows(squares + C, q_k * scale, row, count, stride, 0, C, C, C)
        store_rows(squares + 2 * C, r_k, row, count, stride, 0, C, C, C)

    # The inverse of a block from those of its halves: (I + Z) B (I + Z), with B the scores between them.
    r_b, q_b = r_b.to(DT), (q_b * scale).to(DT)
    z = tl.where((i ^ j) == 1, r_b.to(tl.float32), 0.0)
    for level in range(1, LEVELS):
        square = tl.where((i >> level) ^ 1 == (j >> level), r_b, 0.0)
        square = square.to(tl.float32) + tl.dot(z.to(DT), square, input_precision=PRECISION)
        z += square + tl.dot(square.to(DT), z.to(DT), input_precision=PRECISION)
    # What the scan multiplies by the state and by v, so that only one of its products waits for another.
    solved = (z + tl.where(i == j, 1.0, 0.0)).to(DT)
    by_read = tl.dot(q_b, solved, input_precision=PRECISION).to(DT)
    unit = tl.where(i == j, 1.0, 0.0).to(DT)
    store_rows(squares, solved, row, count, stride, 0, C, C, C)
    store_rows(squares + (C if DELTA else 3 * C), by_read, row, count, stride, 0, C, C, C)
    tl.debug_barrier()
    if not DELTA:
        right = load_rows(squares + 2 * C, row, count, stride, 0, C, C, C)
        q_k = load_rows(squares + C, row, count, stride, 0, C, C, C)
        q_k = tl.dot(unit, q_k, acc=tl.dot(by_read, right, input_precision=PRECISION), input_precision=PRECISION)
        r_k = tl.dot(solved, right, input_precision=PRECISION)
        store_rows(squares + C, q_k, row, count, stride, 0, C, C, C)
        store_rows(squares + 2 * C, r_k, row, count, stride, 0, C, C, C)
        tl.debug_barrier()
    mixed = tl.trans(load_rows(squares + (0 if DELTA else 2 * C), row, count, stride, 0, C, C, C))
    stride = HV * 4 * K
    for column in range(0, K, BK):
        read = load_rows(factors, row, count, stride, column, K, C, BK)
        query = load_rows(factors + K, row, count, stride, column, K, C, BK)
        write = load_rows(factors + 2 * K, row, count, stride, column, K, C, BK)
        last = load_last(sums, row, count, HV * K, column, K, BK)[None, :]
        rest = tl.where(tl.min(last) >= -limit, tl.exp((last * 0.5).to(tl.float32)), 1.0)
        store_rows(factors + 2 * K, write.to(tl.float32) * rest, row, count, stride, column, K, C, BK)
        kept = tl.dot(mixed, write, input_precision=PRECISION)
        if not DELTA:
            key = load_rows(factors + 3 * K, row, count, stride, column, K, C, BK)
            kept = tl.dot(unit, key, acc=kept, input_precision=PRECISION)
        queries = tl.dot(unit, query, input_precision=PRECISION) * scale
        queries = tl.dot(by_read, read, acc=queries, input_precision=PRECISION)
        reads = tl.dot(solved, read, input_precision=PRECISION)
        store_rows(factors, reads * rest, row, count, stride, column, K, C, BK)
        store_rows(factors + K, queries * rest, row, count, stride, column, K, C, BK)
        store_rows(factors + 3 * K, kept * rest, row, count, stride, column, K, C, BK)


@triton.jit(do_not_specialize=SIZES)
def scan(
    crossing, v, sums, squares, factors, entering, initial, final, o, cu_seqlens, first_chunk, length, chunks,
    tile_count, segment, segments, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
    DELTA: tl.constexpr, SAVE: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """The state from chunk to chunk, in registers; one program per sequence, segment, value head and tile of V.
    Everything is transposed: state [BV, BK], tokens [BV, C]. LEAN: no outputs; each segment but the last ones starts
    from nothing, and further tiles, without values, from the identity: what `carry` puts together."""
    SQUARES: tl.constexpr = 2 if DELTA else 4
    tile, head, n, s, last, begin, size, chunk = _segment(
        length, chunks, cu_seqlens, first_chunk, tile_count, segment, segments, HV, C, PACKED
    )
    column, number, border = tile * BV, n.to(tl.int64) * HV + head, begin // segment * HV + head
    squares += head * SQUARES * C
    factors += head * 4 * K
    state = tl.zeros([BV, BK], tl.float32)
    if initial is not None:
        state = tl.trans(load_state(initial, number, 1 - s, column, K, V, BK, BV))
    turned = column - (V + BV - 1) // BV * BV  # the first row of the transition, or below zero
    if LEAN:
        rows = turned + tl.arange(0, BV)
        state += tl.where(rows[:, None] == tl.arange(0, BK)[None, :], 1.0, 0.0)
        size = tl.where((s < last) & ((turned < 0) | (s > 0)), size, 0)
    elif crossing is not None:
        width = tl.where((s > 0) & (s <= last), V - column, 0)
        state += load_rows(crossing, (border - HV) * (V + K) + column, width, K, 0, K, BV, BK)
    for i in range(0, tl.cdiv(size, C)):
        offset = chunk_offset(i, size, C)
        row, count = begin + offset, tl.minimum(size - offset, C)
        low = state.to(DT)
        if SAVE and not LEAN:
            place = (chunk + offset // C).to(tl.int64) * HV + head
            store_rows(entering, low, place * V + column, V - column, K, 0, K, BV, BK)
        some = tl.where(turned < 0, count, 0) if LEAN else count
        values = tl.trans(load_rows(v + head * V, row, some, HV * V, column, V, C, BV)).to(DT)
        reads = load_rows(factors, row, count, HV * 4 * K, 0, K, C, BK)
        known = tl.dot(low, tl.trans(reads), input_precision=PRECISION).to(DT)
        if not LEAN:
            queries = load_rows(factors + K, row, count, HV * 4 * K, 0, K, C, BK)
            scores = load_rows(squares + C, row, count, HV * SQUARES * C, 0, C, C, C)
            result = tl.dot(low, tl.trans(queries), input_precision=PRECISION)
            result = tl.dot(values, tl.trans(scores), acc=result, input_precision=PRECISION)
        writes = load_rows(factors + 2 * K, row, count, HV * 4 * K, 0, K, C, BK)
        kept = load_rows(factors + 3 * K, row, count, HV * 4 * K, 0, K, C, BK)
        state *= decay_of(load_last(sums + head * K, row, count, HV * K, 0, K, BK))[None, :]
        state = tl.dot(values, kept, acc=state, input_precision=PRECISION)
        state = tl.dot(known, writes, acc=state, input_precision=PRECISION)
        if not LEAN:
            store_rows(o + head * V, tl.trans(result), row, count, HV * V, column, V, C, BV)
    if LEAN:
        place = border * (V + K) + tl.where(turned < 0, column, V + turned)
        width = tl.where(turned < 0, V - column, K - turned)
        store_rows(crossing, state, place, tl.where(size > 0, width, 0), K, 0, K, BV, BK)
    else:
        if s == last:
            store_state(final, tl.trans(state), number, column, K, V, BK, BV)
