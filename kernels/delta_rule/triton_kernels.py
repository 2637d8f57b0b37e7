# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the delta rule: two launches forward, two backward; where sequences are cut, two more each way.

Inside a chunk, with b the running sum of its log decays, N_ij = exp(b_i - b_j) (k_i . k_j) for j < i and
P_ij = scale exp(b_i - b_j) (q_i . k_j) for j <= i, the writes are u = T r with
    r = beta x,    x_i = v_i - exp(b_i) k_i S_0,    T = (I + diag(beta) N)^-1 = I - diag(beta) Z.
`prepare` applies T to what reads the writes, not to the writes, so that the recurrence is two products deep and sums
that cancel are added up before anything is rounded:
    A = P T,    E = T^t Ke,    Ke_j = exp(b_C - b_j) k_j,
    o = scale exp(b) q S_0 + A r,    S_C = exp(b_C) S_0 + E^t r,    y = x - Z r,    u = beta y.
Backward, the gradients of P, of the triangular matrix diag(beta) N and of Ke are do u^t, -dR u^t and u dS_C^t, so that
the inverse is not differentiated, with
    dR = A^t do + E dS_C,    dv = beta dR,    dbeta = rowsum(dR * y),
    dS_0 = exp(b_C) dS_C + scale (exp(b) q)^t do - (exp(b) k)^t dv.
A log decay counts for all that passes it. The gradient of that of token t is a sum over the pairs j < t <= i of
    M_ij = (do_i . u_j) P_ij - (dR_i . u_j) beta_i N_ij,
over the reads of S_0 by tokens i >= t, over what tokens j < t write and the chunk's end still has, and of what passes
the whole chunk, exp(b_C) <S_0, dS_C>. No term lacks the decay that it is differentiated by: where decays are strong,
nothing large has to cancel.

No accumulator of a product is transposed: on Hopper some releases of triton compile that into wrong numbers. Where a
transposed product is needed, what was loaded is multiplied the other way round.

Shapes: B batch, T tokens, H key heads, HV value heads, C tokens of a chunk; e [B, T, HV, K]; at (A transposed) and zt
(Z transposed) [B, T, HV, C]; y [B, T, HV, V]; entering and leaving [chunks, HV, V, K], transposed states before each
chunk and gradients of those after it; crossing [borders, HV, V + K, K], transposed states between segments
and transitions of segments (backward [borders, HV, V, K], gradients); factors [chunks, HV, 4, C, 2];
sums [chunks, HV, C]; dv
holds dR_j / |k_j| until `gradients` scales it. The scans keep the state transposed: it and r enter their products as
left operands, straight from registers. Keys and queries enter products unrounded: factors scale rows and columns, and
that of a k_j that writes is moved into r_j: e, at, zt and beta stand for e_j / |k_j|, ..., beta_j |k_j|.
"""

import triton
import triton.language as tl

from zoo.kernels import tiles

# Numbers that change from call to call would multiply the compilations; from those of heads come addresses.
SIZES = ["length", "chunks", "tile_count", "segment", "segments"]
# `factors`, where |x| is the factor that normalises x: scale exp(b) |q|, exp(b), exp(b) |k|, beta |k|, |q|, |k|,
# exp(b_C - b), beta exp(b) |k|^2.
QUERY_READ, FROM_START, KEY_READ, WRITTEN, QUERY_NORM, KEY_NORM, TO_END, ERASED = (tl.constexpr(i) for i in range(8))


@triton.jit
def _factor(factors, number, WHICH: tl.constexpr, C: tl.constexpr):
    """Where [C] of one factor of a chunk lies."""
    return factors + (number * 8 + WHICH // 2 * 2) * C + WHICH % 2 + tl.arange(0, C) * 2


@triton.jit
def _two_factors(factors, number, WHICH: tl.constexpr, C: tl.constexpr):
    """Factors WHICH and WHICH + 1, [C] each. The threads share out the load of two; of one each would fetch all that
    it multiplies."""
    place = factors + (number * 8 + WHICH) * C
    return tl.split(tl.load(place + (tl.arange(0, C)[:, None] * 2 + tl.arange(0, 2)[None, :])))


@triton.jit
def _total(factors, number, C: tl.constexpr):
    """The decay over a chunk; tokens beyond its end decay no further."""
    return tl.load(factors + (number * 8 + FROM_START // 2 * 2 + 2) * C - 2 + FROM_START % 2)


@triton.jit
def _norm(x, NORM: tl.constexpr, C: tl.constexpr):
    """rsqrt(sum(x * x) + 1e-6) of the rows, or ones."""
    return tl.rsqrt(tl.sum(x * x, 1) + 1e-6) if NORM else tl.full([C], 1.0, tl.float32)


@triton.jit
def _running_sum(decay, row, count, heads, head, C: tl.constexpr, DECAY: tl.constexpr, SUM: tl.constexpr):
    """Log decays are bounded below where exp is zero anyway, so that -1e4 does not swamp the digits of the others."""
    r = tl.arange(0, C)
    step = tl.full([C], 0.0, tl.float32)
    if DECAY:  # 1: the same for every token, 2: its own
        step = tl.load(decay + (row + r) * (heads * (DECAY - 1)) + head, mask=r < count, other=0.0)
    step = tl.where(r < count, tl.maximum(step, -120.0), 0.0)
    return tl.cumsum(step.to(SUM), 0)


@triton.jit
def _diagonal_blocks(n, beta, C: tl.constexpr):
    """Z transposed of the 16 x 16 diagonal blocks by substitution, last row first, all blocks at once; [C, C]."""
    G: tl.constexpr = C // 16
    g = tl.arange(0, G)
    i = tl.arange(0, 16)
    own = g[:, None, None, None] == g[None, None, :, None]
    z = tl.sum(tl.where(own, tl.reshape(n, [G, 16, G, 16]), 0.0), 2)  # [G, 16, 16]
    upper = z * tl.reshape(beta, [G, 16])[:, None, :]
    for step in range(15):
        j = 15 - step
        column = tl.sum(tl.where(i[None, None, :] == j, upper, 0.0), 2)
        final = tl.sum(tl.where(i[None, :, None] == j, z, 0.0), 1)
        z -= column[:, :, None] * final[:, None, :]
    return tl.reshape(tl.where(own, z[:, :, None, :], 0.0), [C, C])


@triton.jit
def _nearest(x, PRECISION: tl.constexpr):
    """Products in TF32 cut digits off; with half of the last kept digit added first, they round."""
    if PRECISION == "tf32":
        x = (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _merge_blocks(z, n, beta, SIZE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Z transposed of diagonal blocks of 2 SIZE from that of SIZE: Z + (I - Z diag(beta)) B (I - diag(beta) Z), where
    B is n in the upper right quarters of the larger blocks."""
    r = tl.arange(0, C)
    block = r // SIZE
    quarter = (block[:, None] + 1 == block[None, :]) & (block % 2 == 0)[:, None]
    middle = tl.where(quarter, n, 0.0)
    left, right = _nearest(z * -beta[None, :], PRECISION), _nearest(z * -beta[:, None], PRECISION)
    middle = tl.dot(left, _nearest(middle, PRECISION), acc=middle, input_precision=PRECISION)
    return tl.dot(_nearest(middle, PRECISION), right, acc=z + middle, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES[:2])
def prepare(
    q, k, beta, decay, e, at, zt, factors, sums, starts, counts, length, chunks, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """All that is free of the state; one program per chunk and value head. KEEP: also what the backward pass reads; zt
    holds -Z transposed."""
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    key_head = head // (HV // H)
    row, count = tiles.chunk_rows(chunk, length, chunks, starts, counts, C, PACKED)
    number = chunk.to(tl.int64) * HV + head
    keys = tiles.load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
    queries = tiles.load_rows(q + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
    strength = tiles.load_gate(beta, row, count, HV, head, C)
    sum = _running_sum(decay, row, count, HV, head, C, DECAY, sums.dtype.element_ty)
    q_norm, k_norm = _norm(queries.to(tl.float32), NORM, C), _norm(keys.to(tl.float32), NORM, C)
    r = tl.arange(0, C)
    last = tl.sum(tl.where(r == C - 1, sum, 0.0), 0)
    from_start, to_end = tl.exp(sum.to(tl.float32)), tl.exp((last - sum).to(tl.float32))
    written = strength * k_norm
    tl.store(_factor(factors, number, FROM_START, C), from_start)
    tl.store(_factor(factors, number, TO_END, C), to_end)
    tl.store(_factor(factors, number, QUERY_NORM, C), q_norm)
    tl.store(_factor(factors, number, KEY_NORM, C), k_norm)
    tl.store(_factor(factors, number, WRITTEN, C), written)
    tl.store(_factor(factors, number, QUERY_READ, C), scale * q_norm * from_start)
    tl.store(_factor(factors, number, KEY_READ, C), k_norm * from_start)
    tl.store(_factor(factors, number, ERASED, C), k_norm * written * from_start)
    if KEEP and DECAY:
        tl.store(sums + number * C + r, sum)
    # Rows beyond the chunk are zeros, and the sum stays: no mask is needed but that of earlier tokens.
    between = tl.exp(tl.minimum(sum[None, :] - sum[:, None], 0.0).to(tl.float32))
    n = tl.dot(keys, tl.trans(keys), input_precision=PRECISION) * between * k_norm[None, :]
    n = tl.where(r[:, None] < r[None, :], n, 0.0)
    z = _diagonal_blocks(n, written, C)
    z = _merge_blocks(z, n, written, 16, C, PRECISION) if C > 16 else z
    z = _merge_blocks(z, n, written, 32, C, PRECISION) if C > 32 else z
    if KEEP:
        tiles.store_rows(zt + head * C, -z, row, count, HV * C, 0, C, C, C)
    if keys.dtype == tl.float32 or BK > 128:  # loaded again: the inverse needs the registers
        keys = tiles.load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
        queries = tiles.load_rows(q + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
    # The same decays in another way: those from above would have kept their registers.
    bits = sum * 1.4426950408889634
    between = tl.exp2(tl.minimum(bits[None, :] - bits[:, None], 0.0).to(tl.float32))
    reads = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * between * (scale * q_norm)[None, :]
    reads = tl.where(r[:, None] <= r[None, :], reads, 0.0)
    solved = z * -written[None, :]
    right = _nearest(reads, PRECISION)
    reads = tl.dot(_nearest(solved, PRECISION), right, acc=reads, input_precision=PRECISION)
    tiles.store_rows(at + head * C, reads, row, count, HV * C, 0, C, C, C)
    # Two terms of `solved`, and keys that nothing has rounded: where keys are alike, little is left of large terms.
    solved *= to_end[None, :]
    if keys.dtype == tl.bfloat16:
        solved += tl.where(r[:, None] == r[None, :], to_end[None, :], 0.0)
        coarse = solved.to(DT)
        writes = tl.dot((solved - coarse.to(tl.float32)).to(DT), keys)
        writes = tl.dot(coarse, keys, acc=writes)
    else:
        writes = tl.dot(solved, keys, acc=keys * to_end[:, None], input_precision=PRECISION)
    tiles.store_rows(e + head * K, writes, row, count, HV * K, 0, K, C, BK)


@triton.jit
def _segment(
    length, chunks, cu_seqlens, first_chunk, tile_count, segment, segments, HV: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Tile, value head, sequence and segment of a program; the last segment of the sequence; first row, tokens and
    first chunk of the segment."""
    tile, n = tl.program_id(0) % tile_count, tl.program_id(0) // tile_count
    head, n = n % HV, n // HV
    s, n = n % segments, n // segments
    row, size, chunk = tiles.sequence_rows(n, length, chunks, cu_seqlens, first_chunk, PACKED)
    last = tl.maximum(tl.cdiv(size, segment), 1) - 1
    size = tl.maximum(tl.minimum(size - s * segment, segment), 0)
    return tile, head, n, s, last, row + s * segment, size, chunk + s * segment // C


@triton.jit
def _store_state(x, state, row, count, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """In halves: the way from a product to memory takes room for them that the loads of a scan want."""
    left, right = tl.split(tl.trans(tl.reshape(state, [BV, 2, BK // 2]), (0, 2, 1)))
    tiles.store_rows(x, left, row, count, K, 0, K, BV, BK // 2)
    tiles.store_rows(x, right, row, count, K, BK // 2, K, BV, BK // 2)


@triton.jit(do_not_specialize=SIZES)
def scan(
    crossing, q, k, v, e, at, zt, factors, y, entering, initial, final, o, cu_seqlens, first_chunk, length, chunks,
    tile_count, segment, segments, scale, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, DECAY: tl.constexpr, STAGES: tl.constexpr, INITIAL: tl.constexpr, KEEP: tl.constexpr,
    LEAN: tl.constexpr,
):  # fmt: skip
    """The state from chunk to chunk, in registers, and all outputs; one program per sequence, segment, value head and
    tile of V. Everything is transposed: state [BV, BK], tokens [BV, C]. LEAN: no outputs; each segment but the last
    ones starts from nothing, and further tiles, without values, from the identity: what `carry` puts together."""
    tile, head, n, s, last, begin, size, chunk = _segment(
        length, chunks, cu_seqlens, first_chunk, tile_count, segment, segments, HV, C, PACKED
    )
    key_head, column = head // (HV // H), tile * BV
    state_number, border = n.to(tl.int64) * HV + head, begin // segment * HV + head
    state = tl.zeros([BV, BK], tl.float32)
    if INITIAL and s == 0:
        state = tl.trans(tiles.load_state(initial, state_number, 1, column, K, V, BK, BV))
    turned = column - (V + BV - 1) // BV * BV  # the first row of the transition, or below zero
    if LEAN:
        rows = turned + tl.arange(0, BV)
        state += tl.where(rows[:, None] == tl.arange(0, BK)[None, :], 1.0, 0.0)
        size = tl.where((s < last) & ((turned < 0) | (s > 0)), size, 0)
    elif crossing is not None and (s > 0) & (s <= last):
        place = (border - HV) * (V + K) + column
        state = tiles.load_rows(crossing, place, V - column, K, 0, K, BV, BK)
    valued = tl.where(turned < 0, size, 0) if LEAN else size
    values = tiles.load_rows(v + head * V, begin, valued, HV * V, column, V, C, BV)
    for i in tl.range(0, tl.cdiv(size, C), num_stages=STAGES):
        offset = tiles.chunk_offset(i, size, C)
        row, count = begin + offset, tl.minimum(size - offset, C)
        number = (chunk + offset // C).to(tl.int64) * HV + head
        low = state.to(DT)
        keys = tiles.load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
        known = tl.dot(low, tl.trans(keys), input_precision=PRECISION)
        key_read, written = _two_factors(factors, number, KEY_READ, C)
        x = tl.trans(values).to(tl.float32) - known * key_read[None, :]
        right = (x * written[None, :]).to(DT)
        values = tiles.load_rows(v + head * V, row + C, valued - offset - C, HV * V, column, V, C, BV)
        if KEEP and not LEAN:
            solved = tiles.load_rows(zt + head * C, row, count, HV * C, 0, C, C, C).to(DT)
            error = tl.dot(right, solved, acc=x, input_precision=PRECISION)
            tiles.store_rows(y + head * V, tl.trans(error), row, count, HV * V, column, V, C, BV)
            _store_state(entering, low, number * V + column, V - column, K, BV, BK)
        writes = tiles.load_rows(e + head * K, row, count, HV * K, 0, K, C, BK).to(DT)
        if DECAY:
            state *= _total(factors, number, C)
        state = tl.dot(right, writes, acc=state, input_precision=PRECISION)
        if not LEAN:
            queries = tiles.load_rows(q + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
            result = tl.dot(low, tl.trans(queries), input_precision=PRECISION)
            query_read, _ = _two_factors(factors, number, QUERY_READ, C)
            result *= query_read[None, :]
            reads = tiles.load_rows(at + head * C, row, count, HV * C, 0, C, C, C).to(DT)
            result = tl.dot(right, reads, acc=result, input_precision=PRECISION)
            tiles.store_rows(o + head * V, tl.trans(result), row, count, HV * V, column, V, C, BV)
    if LEAN:
        place = border * (V + K) + tl.where(turned < 0, column, V + turned)
        width = tl.where(turned < 0, V - column, K - turned)
        tiles.store_rows(crossing, state, place, tl.where(size > 0, width, 0), K, 0, K, BV, BK)
    elif s == last:
        tiles.store_state(final, tl.trans(state), state_number, column, K, V, BK, BV)


@triton.jit(do_not_specialize=SIZES)
def carry(
    states, crossing, cu_seqlens, first_chunk, length, chunks, tile_count, segment, segments, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """From the states that segments leave when they start from nothing, in place, to those that they leave; REVERSE:
    likewise gradients, backward. One program per sequence, value head and tile of V, which owns its rows."""
    tile, head, n, s, last, begin, _, _ = _segment(
        length, chunks, cu_seqlens, first_chunk, tile_count, segment, 1, HV, C, PACKED
    )
    row, border = tile * BV, begin // segment
    ROWS: tl.constexpr = V if REVERSE else V + K
    N: tl.constexpr = min(BN, BK)
    number = (border + tl.where(REVERSE, last - 1, 0)) * HV + head
    state = tiles.load_rows(states, number * ROWS + row, V - row if last > 1 else 0, K, 0, K, BV, BK)
    for i in range(1, last):
        step = border + (last - i if REVERSE else i)
        turn = (step * HV + head) * (V + K) + V
        place = ((step - 1 if REVERSE else step) * HV + head) * ROWS + row
        for column in tl.static_range(0, BK, N):
            own = tiles.load_rows(states, place, V - row, K, column, K, BV, N)
            if REVERSE:
                by = tl.trans(_nearest(tiles.load_rows(crossing, turn + column, K - column, K, 0, K, N, BK), PRECISION))
            else:
                by = _nearest(tiles.load_rows(crossing, turn, K, K, column, K, BK, N), PRECISION)
            own = tl.dot(_nearest(state, PRECISION), by, acc=own, input_precision=PRECISION)
            tiles.store_rows(states, own, place, V - row, K, column, K, BV, N)
        if N < BK:
            tl.debug_barrier()  # every thread reads what others stored
            state = tiles.load_rows(states, place, V - row, K, 0, K, BV, BK)
        else:
            state = own


@triton.jit(do_not_specialize=SIZES)
def scan_backward(
    crossing, q, k, e, at, factors, do, dv, leaving, dfinal, dinitial, cu_seqlens, first_chunk, length, chunks,
    tile_count, segment, segments, scale, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, DECAY: tl.constexpr, STAGES: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
    LEAN: tl.constexpr,
):  # fmt: skip
    """The gradient of the state, last chunk first; programs, layout and LEAN as in `scan`."""
    tile, head, n, s, last, begin, size, chunk = _segment(
        length, chunks, cu_seqlens, first_chunk, tile_count, segment, segments, HV, C, PACKED
    )
    key_head, column = head // (HV // H), tile * BV
    state_number, border = n.to(tl.int64) * HV + head, begin // segment * HV + head
    d_state = tl.zeros([BV, BK], tl.float32)
    if FINAL and s == last:
        d_state = tl.trans(tiles.load_state(dfinal, state_number, 1, column, K, V, BK, BV))
    if LEAN:
        size = tl.where(s > 0, size, 0)
    elif crossing is not None and s < last:
        d_state = tiles.load_rows(crossing, border * V + column, V - column, K, 0, K, BV, BK)
    for i in tl.range(0, tl.cdiv(size, C), num_stages=STAGES):
        offset = tiles.chunk_offset(tl.cdiv(size, C) - 1 - i, size, C)
        row, count = begin + offset, tl.minimum(size - offset, C)
        number = (chunk + offset // C).to(tl.int64) * HV + head
        low = d_state.to(DT)
        if not LEAN:
            _store_state(leaving, low, number * V + column, V - column, K, BV, BK)
        writes = tiles.load_rows(e + head * K, row, count, HV * K, 0, K, C, BK).to(DT)
        d_right = tl.dot(low, tl.trans(writes), input_precision=PRECISION)
        grad = tl.trans(tiles.load_rows(do + head * V, row, count, HV * V, column, V, C, BV))
        reads = tiles.load_rows(at + head * C, row, count, HV * C, 0, C, C, C).to(DT)
        d_right = tl.dot(grad.to(DT), tl.trans(reads), acc=d_right, input_precision=PRECISION)
        if not LEAN:
            tiles.store_rows(dv + head * V, tl.trans(d_right), row, count, HV * V, column, V, C, BV)
        if DECAY:
            d_state *= _total(factors, number, C)
        keys = tiles.load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
        _, erased = _two_factors(factors, number, TO_END, C)
        d_error = (-d_right * erased[None, :]).to(DT)
        d_state = tl.dot(d_error, keys, acc=d_state, input_precision=PRECISION)
        queries = tiles.load_rows(q + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
        query_read, _ = _two_factors(factors, number, QUERY_READ, C)
        d_read = (grad.to(tl.float32) * query_read[None, :]).to(DT)
        d_state = tl.dot(d_read, queries, acc=d_state, input_precision=PRECISION)
    if LEAN:
        width = tl.where(size > 0, V - column, 0)
        tiles.store_rows(crossing, d_state, (border - HV) * V + column, width, K, 0, K, BV, BK)
    elif INITIAL and s == 0:
        tiles.store_state(dinitial, tl.trans(d_state), state_number, column, K, V, BK, BV)


@triton.jit(do_not_specialize=SIZES[:2])
def gradients(
    q, k, factors, sums, y, entering, leaving, do, dq, dk, dv, dbeta, ddecay, starts, counts, length, chunks,
    scale, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, DECAY: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """All that the chunks yield on their own; one program per chunk and value head."""
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    key_head = head // (HV // H)
    row, count = tiles.chunk_rows(chunk, length, chunks, starts, counts, C, PACKED)
    number = chunk.to(tl.int64) * HV + head
    q_norm, k_norm = _two_factors(factors, number, QUERY_NORM, C)
    _, written = _two_factors(factors, number, KEY_READ, C)
    r = tl.arange(0, C)
    later, same = r[:, None] > r[None, :], r[:, None] == r[None, :]
    outputs = tl.zeros([C, C], tl.float32)
    solves, outputs_t, solves_t = outputs, outputs, outputs
    for column in range(0, V, BV):
        grad = tiles.load_rows(do + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        right = tiles.load_rows(dv + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        errors = tiles.load_rows(y + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        outputs = tl.dot(grad, tl.trans(errors), acc=outputs, input_precision=PRECISION)
        solves = tl.dot(right, tl.trans(errors), acc=solves, input_precision=PRECISION)
        outputs_t = tl.dot(errors, tl.trans(grad), acc=outputs_t, input_precision=PRECISION)
        solves_t = tl.dot(errors, tl.trans(right), acc=solves_t, input_precision=PRECISION)
    d_strength = tl.sum(tl.where(same, solves, 0.0), 1) * k_norm
    keys = tiles.load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
    queries = tiles.load_rows(q + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
    reading, solving = scale * q_norm, k_norm * written
    decay = tl.full([C, C], 1.0, tl.float32)
    if DECAY:
        sum = tl.load(sums + number * C + r)
        gap = (sum[:, None] - sum[None, :]).to(tl.float32)
        decay = tl.exp(tl.minimum(gap, -gap))
    outputs = tl.where(later | same, outputs * decay * reading[:, None] * written[None, :], 0.0)
    outputs_t = tl.where(later, 0.0, outputs_t * decay * reading[None, :] * written[:, None]).to(DT)
    solves = tl.where(later, solves * decay * solving[:, None] * written[None, :], 0.0)
    solves_t = tl.where(later | same, 0.0, solves_t * decay * solving[None, :] * written[:, None])
    both = (-solves - solves_t).to(DT)
    if DECAY:
        by_pair = tl.where(same, 0.0, outputs * tl.dot(queries, tl.trans(keys), input_precision=PRECISION))
        by_pair -= solves * tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
        by_read = tl.sum(by_pair, 1) - tl.sum(by_pair, 0)
    outputs = outputs.to(DT)

    d_query, states = tl.zeros([C, BK], tl.float32), tl.where(count > 0, V, 0)  # an empty chunk has no states
    for column in range(0, V, BV):
        before = tiles.load_rows(entering, number * V + column, states - column, K, 0, K, BV, BK).to(DT)
        grad = tiles.load_rows(do + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        d_query = tl.dot(grad, before, acc=d_query, input_precision=PRECISION)
    d_query *= tl.load(_factor(factors, number, QUERY_READ, C))[:, None]
    # Loaded again: what is kept in registers for so long leaves too few.
    rows = tiles.load_rows(q + key_head * K, row, count, H * K, 0, K, C, BK).to(tl.float32)
    if DECAY:
        by_read += tl.sum(rows * d_query, 1)
    d_query = tl.dot(outputs, keys, acc=d_query, input_precision=PRECISION)
    if NORM:
        d_query -= (q_norm * q_norm * tl.sum(rows * d_query, 1))[:, None] * rows
    tiles.store_rows(dq + head * K, d_query, row, count, HV * K, 0, K, C, BK)

    d_key = tl.zeros([C, BK], tl.float32)
    _, written = _two_factors(factors, number, KEY_READ, C)
    to_end, erased = _two_factors(factors, number, TO_END, C)
    for column in range(0, V, BV):
        before = tiles.load_rows(entering, number * V + column, states - column, K, 0, K, BV, BK).to(DT)
        right = tiles.load_rows(dv + head * V, row, count, HV * V, column, V, C, BV)
        d_key = tl.dot(right.to(DT), before, acc=d_key, input_precision=PRECISION)
        right = written[:, None] * right.to(tl.float32)
        tiles.store_rows(dv + head * V, right, row, count, HV * V, column, V, C, BV)
    d_key *= -erased[:, None]
    if DECAY:
        by_key = tl.sum(tiles.load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK).to(tl.float32) * d_key, 1)
        by_read += by_key
    tl.store(dbeta + (row + r) * HV + head, d_strength, mask=r < count)
    carried = tl.zeros([BV], tl.float32)
    for column in range(0, V, BV):
        after = tiles.load_rows(leaving, number * V + column, states - column, K, 0, K, BV, BK)
        errors = tiles.load_rows(y + head * V, row, count, HV * V, column, V, C, BV).to(tl.float32)
        errors = (errors * (written * to_end)[:, None]).to(DT)
        d_key = tl.dot(errors, after.to(DT), acc=d_key, input_precision=PRECISION)
        if DECAY:
            before = tiles.load_rows(entering, number * V + column, states - column, K, 0, K, BV, BK)
            carried += tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)
    rows = tiles.load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK).to(tl.float32)
    if DECAY:
        by_write = tl.sum(rows * d_key, 1) - by_key
        passing = tl.where(r[:, None] >= r[None, :], by_read[:, None], by_write[:, None])
        d_decay = tl.sum(passing, 0) + _total(factors, number, C) * tl.sum(carried, 0)
        tl.store(ddecay + (row + r) * HV + head, d_decay, mask=r < count)
    d_key = tl.dot(outputs_t, queries, acc=d_key, input_precision=PRECISION)
    d_key = tl.dot(both, keys, acc=d_key, input_precision=PRECISION)
    if NORM:
        _, k_norm = _two_factors(factors, number, QUERY_NORM, C)
        d_key -= (k_norm * k_norm * tl.sum(rows * d_key, 1))[:, None] * rows
    tiles.store_rows(dk + head * K, d_key, row, count, HV * K, 0, K, C, BK)
