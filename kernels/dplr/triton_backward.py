# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of diagonal-plus-low-rank transitions, backward: three launches.

With u = (I - A)^-1 x and what leaves a chunk S_1, every use of u and x inside the chunk is linear:
    du = (q.b)^T do + b_end dS_1,    dx = (I - A)^-T du,    dS_0 = exp(decay) dS_1 + q_start^T do + W^T du,
and the scores have the gradients dA = dx u^T and do u^T, dx v^T and do v^T: the inverse is not differentiated.

The log decay of a token gets what flows past it: reads of the entering state by it and by later tokens, writes of
earlier tokens to the chunk's end, the state that passes the chunk, and, level by level, scores of a later token on an
earlier one. Every such sum holds only what flows past, so none is the small difference of large ones.

No accumulator of a product is transposed: on Hopper some releases of triton compile that into wrong numbers. Gradients
of scores go through memory instead.

Shapes: as in triton_forward; du and dx [B, T, HV, V], leaving [chunks, HV, K, V], d_squares [B, T, HV, PAIRS C], of
the scores q.b, r.b, q.k, r.k, mirrored at the diagonal; products [B, T, HV, 3], of q, k and beta with their gradients.
"""

import triton
import triton.language as tl

from zoo.kernels.dplr.triton_forward import SIZES, decay_of, level_decays, load_last, load_sides, load_sums
from zoo.kernels.tiles import chunk_rows, load_gate, load_rows, load_state, sequence_rows, store_rows, store_state


@triton.jit(do_not_specialize=SIZES)
def scan_backward(
    sums, squares, factors, do, du, leaving, dfinal, dinitial,
    cu_seqlens, first_chunk, length, chunks, HV, tiles,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, DELTA: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The gradient of the state, last chunk first; one program per sequence, value head and tile of V."""
    SQUARES: tl.constexpr = 2 if DELTA else 4
    FACTORS: tl.constexpr = 3 if DELTA else 4
    pid = tl.program_id(0)
    column = (pid % tiles) * BV
    n = pid // tiles // HV
    head = pid // tiles % HV
    begin, size, chunk = sequence_rows(n, length, chunks, cu_seqlens, first_chunk, PACKED)
    number = n.to(tl.int64) * HV + head
    squares += head * SQUARES * C
    factors += head * FACTORS * K
    if FINAL:
        d_state = load_state(dfinal, number, 1, column, K, V, BK, BV)
    else:
        d_state = tl.zeros([BK, BV], tl.float32)
    total = tl.cdiv(size, C)
    for step in range(0, total):
        i = total - 1 - step
        row = begin + i * C
        count = tl.minimum(size - i * C, C)
        low = d_state.to(DT)
        store_state(leaving, low, (chunk + i) * HV + head, column, K, V, BK, BV)
        reads = load_rows(factors, row, count, HV * FACTORS * K, 0, K, C, BK)
        queries = load_rows(factors + K, row, count, HV * FACTORS * K, 0, K, C, BK)
        writes = load_rows(factors + 2 * K, row, count, HV * FACTORS * K, 0, K, C, BK)
        q_b = load_rows(squares + C, row, count, HV * SQUARES * C, 0, C, C, C)
        grad = load_rows(do + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        last = load_last(sums + head * K, row, count, HV * K, 0, K, BK)
        d_u = tl.dot(tl.trans(q_b), grad, input_precision=PRECISION)
        d_u = (d_u + tl.dot(writes, low, input_precision=PRECISION)).to(DT)
        d_state = d_state * decay_of(last)[:, None] + tl.dot(tl.trans(queries), grad, input_precision=PRECISION)
        d_state += tl.dot(tl.trans(reads), d_u, input_precision=PRECISION)
        store_rows(du + head * V, d_u, row, count, HV * V, column, V, C, BV)
    if INITIAL:
        store_state(dinitial, d_state, number, column, K, V, BK, BV)


@triton.jit(do_not_specialize=SIZES[:-1])
def pairs(
    v, squares, factors, u, leaving, o, do, du, dx, dv, d_squares, products,
    starts, counts, length, chunks, HV, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NORM: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Through the inverse, to v and to the scores; one program per chunk and value head."""
    SQUARES: tl.constexpr = 2 if DELTA else 4
    FACTORS: tl.constexpr = 3 if DELTA else 4
    chunk = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    row, count = chunk_rows(chunk, length, chunks, starts, counts, C, PACKED)
    number = chunk.to(tl.int64) * HV + head
    factors += head * FACTORS * K
    squares += head * SQUARES * C
    z = tl.trans(load_rows(squares, row, count, HV * SQUARES * C, 0, C, C, C))
    q_b = tl.zeros([C, C], tl.float32)
    r_b = tl.zeros([C, C], tl.float32)
    q_k = tl.zeros([C, C], tl.float32)
    r_k = tl.zeros([C, C], tl.float32)
    by_query = tl.zeros([C], tl.float32)
    by_key = tl.zeros([C], tl.float32)
    by_write = tl.zeros([C], tl.float32)
    for column in range(0, V, BV):
        grad = load_rows(do + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        d_u = load_rows(du + head * V, row, count, HV * V, column, V, C, BV)
        writes = load_rows(u + head * V, row, count, HV * V, column, V, C, BV)
        d_x = (d_u.to(tl.float32) + tl.dot(z, d_u, input_precision=PRECISION)).to(DT)
        store_rows(dx + head * V, d_x, row, count, HV * V, column, V, C, BV)
        q_b += tl.dot(grad, tl.trans(writes), input_precision=PRECISION)
        r_b += tl.dot(d_x, tl.trans(writes), input_precision=PRECISION)
        wide = d_x.to(tl.float32)
        by_write += tl.sum(wide * writes.to(tl.float32), 1)
        if NORM:
            out = load_rows(o + head * V, row, count, HV * V, column, V, C, BV).to(tl.float32)
            value = load_rows(v + head * V, row, count, HV * V, column, V, C, BV).to(tl.float32)
            by_query += tl.sum(out * grad.to(tl.float32), 1)
            by_key += tl.sum(wide * (2 * writes.to(tl.float32) - value), 1)
        if not DELTA:
            right = tl.trans(load_rows(v + head * V, row, count, HV * V, column, V, C, BV).to(DT))
            q_k += tl.dot(grad, right, input_precision=PRECISION)
            r_k += tl.dot(d_x, right, input_precision=PRECISION)
            by_q = tl.trans(load_rows(squares + 2 * C, row, count, HV * SQUARES * C, 0, C, C, C))
            by_r = tl.trans(load_rows(squares + 3 * C, row, count, HV * SQUARES * C, 0, C, C, C))
            value = tl.zeros([C, BV], tl.float32)
            for first in range(0, K, BK):
                keys = load_rows(factors + 3 * K, row, count, HV * FACTORS * K, first, K, C, BK)
                present = tl.where(count > 0, K - first, 0)
                after = load_rows(leaving, number * K + first, present, V, column, V, BK, BV)
                value += tl.dot(keys, after, input_precision=PRECISION)
            value += tl.dot(by_q, grad, input_precision=PRECISION)
            value += tl.dot(by_r, d_x, input_precision=PRECISION)
            store_rows(dv + head * V, value, row, count, HV * V, column, V, C, BV)
    PAIRS: tl.constexpr = 2 if DELTA else 4
    stride = HV * PAIRS * C
    d_squares += head * PAIRS * C
    _store_pairs(d_squares, q_b * scale, row, count, stride, C)
    _store_pairs(d_squares + C, r_b, row, count, stride, C)
    if not DELTA:
        _store_pairs(d_squares + 2 * C, q_k * scale, row, count, stride, C)
        _store_pairs(d_squares + 3 * C, r_k, row, count, stride, C)
    if DELTA:
        r = tl.arange(0, C)
        place = products + ((row + r) * HV + head) * 3
        tl.store(place, by_query, mask=r < count)
        tl.store(place + 1, by_key, mask=r < count)
        tl.store(place + 2, by_write, mask=r < count)


@triton.jit
def _store_pairs(x, square, row, count, stride, C: tl.constexpr):
    """The lower triangle, and above the diagonal its mirror image."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    store_rows(x, tl.where(i >= j, square, tl.trans(square)), row, count, stride, 0, C, C, C)


@triton.jit
def _load_own(x, row, count, stride, C: tl.constexpr):
    """The diagonal."""
    r = tl.arange(0, C)
    return tl.load(x + (row + r) * stride + r, mask=r < count, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _across(
    squares, row, count, stride, level, after, later, earlier, near,
    C: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of both sides of the scores of one level: those of reads, `later`, in the rows `after` the border and
    those of writes, `earlier`, in the others; and what each side sends past the border, the same on both."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    square = load_rows(squares, row, count, stride, 0, C, C, C)
    square = tl.where((i >> level) ^ 1 == (j >> level), square, 0.0).to(DT)
    sides = (tl.where(after, later, earlier) * near).to(DT)
    product = tl.dot(square, sides, input_precision=PRECISION)
    return near * product, sides.to(tl.float32) * product


@triton.jit(do_not_specialize=SIZES)
def gradients(
    q, k, v, a, b, beta, sums, norms, u, entering, leaving, do, dx, d_squares, products,
    dq, dk, da, db, dbeta, ddecay, starts, counts, length, chunks, H, HV, tiles, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NORM: tl.constexpr, DELTA: tl.constexpr,
    DECAY: tl.constexpr,
):  # fmt: skip
    """To all that K and the chunks hold; one program per chunk, value head and tile of K."""
    PAIRS: tl.constexpr = 2 if DELTA else 4
    pid = tl.program_id(0)
    first = (pid % tiles) * BK
    chunk = pid // tiles // HV
    head = pid // tiles % HV
    row, count = chunk_rows(chunk, length, chunks, starts, counts, C, PACKED)
    state = (chunk.to(tl.int64) * HV + head) * K + first
    present = tl.where(count > 0, K - first, 0)
    d_query = tl.zeros([C, BK], tl.float32)
    d_key = tl.zeros([C, BK], tl.float32)
    d_read = tl.zeros([C, BK], tl.float32)
    d_write = tl.zeros([C, BK], tl.float32)
    passing = tl.zeros([BK], tl.float32)
    for column in range(0, V, BV):
        grad = load_rows(do + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        d_x = load_rows(dx + head * V, row, count, HV * V, column, V, C, BV)
        writes = load_rows(u + head * V, row, count, HV * V, column, V, C, BV)
        before = load_rows(entering, state, present, V, column, V, BK, BV)
        after = load_rows(leaving, state, present, V, column, V, BK, BV)
        passing += tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)
        d_query += tl.dot(grad, tl.trans(before), input_precision=PRECISION)
        d_read += tl.dot(d_x, tl.trans(before), input_precision=PRECISION)
        d_write += tl.dot(writes, tl.trans(after), input_precision=PRECISION)
        if not DELTA:
            value = load_rows(v + head * V, row, count, HV * V, column, V, C, BV).to(DT)
            d_key += tl.dot(value, tl.trans(after), input_precision=PRECISION)
    r = tl.arange(0, C)
    i = r[:, None]
    j = r[None, :]
    stride = HV * K
    square_stride = HV * PAIRS * C
    sums += head * K
    d_squares += head * PAIRS * C
    query, key, read, write = load_sides(q, k, a, b, beta, norms, row, count, H, HV, head, first, K, C, BK, NORM, DELTA)
    sum, met = load_sums(sums, row, count, stride, first, K, C, BK, DELTA)
    last = load_last(sums, row, count, stride, first, K, BK)[None, :]
    to_end = decay_of(last - sum)
    d_query *= decay_of(sum) * scale
    d_read *= decay_of(met)
    d_write *= to_end
    d_key *= to_end
    d_decay = tl.zeros([C, BK], tl.float32)
    net = tl.zeros([C, BK], tl.float32)
    if DECAY:
        # Token i sees reads of tokens from i on (r of dplr: after i) and writes of tokens before it.
        reads = query * d_query
        writes = write * d_write
        if DELTA:
            reads += read * d_read
        else:
            writes += key * d_key
            past = tl.where(i < j, 1.0, 0.0).to(DT)
            d_decay += tl.dot(past, (read * d_read).to(DT), input_precision=PRECISION)
        d_decay += tl.dot(tl.where(i <= j, 1.0, 0.0).to(DT), reads.to(DT), input_precision=PRECISION)
        d_decay += tl.dot(tl.where(i > j, 1.0, 0.0).to(DT), writes.to(DT), input_precision=PRECISION)
        d_decay += decay_of(last) * passing[None, :]

    own = _load_own(d_squares, row, count, square_stride, C)
    d_query += own * write
    d_write += own * query
    if not DELTA:
        own = _load_own(d_squares + 2 * C, row, count, square_stride, C)
        d_query += own * key
        d_key += own * query
    for level in range(LEVELS):
        again = row + (level >> 8)  # the same row, which no compiler knows: to load again beats to hold in registers
        query, key, read, write = load_sides(
            q, k, a, b, beta, norms, again, count, H, HV, head, first, K, C, BK, NORM, DELTA
        )
        sum, met = load_sums(sums, again, count, stride, first, K, C, BK, DELTA)
        near, met_near, after = level_decays(sums, sum, met, row, count, stride, first, level, K, C, BK, DELTA)
        by_query, flow = _across(
            d_squares, again, count, square_stride, level, after, query, write, near, C, DT, PRECISION
        )
        by_read, read_flow = _across(
            d_squares + C, again, count, square_stride, level, after, read, write, met_near, C, DT, PRECISION
        )
        d_write += tl.where(after, 0.0, by_query + by_read)
        if not DELTA:
            k_query, k_flow = _across(
                d_squares + 2 * C, again, count, square_stride, level, after, query, key, near, C, DT, PRECISION
            )
            d_key += tl.where(after, 0.0, k_query)
            by_query += k_query
            flow += k_flow
            k_read, k_flow = _across(
                d_squares + 3 * C, again, count, square_stride, level, after, read, key, met_near, C, DT, PRECISION
            )
            d_key += tl.where(after, 0.0, k_read)
            by_read += k_read
            read_flow += k_flow
        d_query += tl.where(after, by_query, 0.0)
        d_read += tl.where(after, by_read, 0.0)
        if DECAY:
            flow += read_flow
            net += tl.where(after, flow, -flow)
            if not DELTA:
                d_decay -= tl.where(after, read_flow, 0.0)
    if DECAY:
        d_decay += tl.cumsum(net, 0, reverse=True)
        store_rows(ddecay + head * K, d_decay, row, count, stride, first, K, C, BK)
    if DELTA:
        strength = load_gate(beta, row, count, HV, head, C)
        # u.dx is beta times the gradient and keeps more digits than the other way to it, a sum over K.
        steady = tl.abs(strength) > 1e-20
        by_write = load_gate(products, row, count, 3 * HV, 3 * head + 2, C) / tl.where(steady, strength, 1.0)
        by_write = tl.where(steady, tl.where(first == 0, by_write, 0.0), tl.sum(key * d_write, 1))
        tl.store(dbeta + ((row + r) * HV + head) * tiles + pid % tiles, by_write, mask=r < count)
        d_key = d_write * strength[:, None] - d_read
        if NORM:
            by_query = load_gate(products, row, count, 3 * HV, 3 * head, C)[:, None]
            by_key = load_gate(products, row, count, 3 * HV, 3 * head + 1, C)[:, None]
            d_query -= query * by_query
            d_key -= key * by_key
            d_query *= load_gate(norms, row, count, 2 * HV, 2 * head, C)[:, None]
            d_key *= load_gate(norms, row, count, 2 * HV, 2 * head + 1, C)[:, None]
    else:
        store_rows(da + head * K, d_read, row, count, stride, first, K, C, BK)
        store_rows(db + head * K, d_write, row, count, stride, first, K, C, BK)
    store_rows(dq + head * K, d_query, row, count, stride, first, K, C, BK)
    store_rows(dk + head * K, d_key, row, count, stride, first, K, C, BK)
