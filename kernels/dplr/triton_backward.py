# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of diagonal-plus-low-rank transitions, backward: three launches.

With u = (I - A)^-1 x and what leaves a chunk S_1, every use of u, x and v inside the chunk is linear:
    dx = (I + Z)^T ((q.b)^T do + b_end dS_1),    dv = Q^T do + E dS_1 (for delta dx itself),
    dS_0 = exp(decay) dS_1 + (q_start + (q.b) W)^T do + W^T (b_end dS_1),
and the scores have the gradients dA = dx u^T and do u^T, dx v^T and do v^T: the inverse is not differentiated.

The log decay of a token gets what flows past it: reads of the entering state by it and by later tokens, writes of
earlier tokens to the chunk's end, the state that passes the chunk, and, level by level, scores of a later token on an
earlier one. Every such sum holds only what flows past, so none is the small difference of large ones.

No accumulator of a product is transposed: on Hopper some releases of triton compile that into wrong numbers. Gradients
of scores go through memory instead.

Shapes: as in triton_forward; u and dx [B, T, HV, V], leaving as entering, d_squares [B, T, HV, PAIRS C], of
the scores q.b, r.b, q.k, r.k, mirrored at the diagonal; products [B, T, HV, 3], of q, k and beta with their gradients.
"""

import triton
import triton.language as tl

from zoo.kernels.delta_rule.triton_kernels import _segment
from zoo.kernels.dplr.triton_forward import (
    SIZES,
    decay_of,
    level_decays,
    load_last,
    load_sides,
    load_sums,
    mild_decays,
    split,
)
from zoo.kernels.tiles import chunk_offset, chunk_rows, load_gate, load_rows, load_state, store_rows, store_state


@triton.jit(do_not_specialize=SIZES)
def scan_backward(
    crossing, sums, factors, do, leaving, dfinal, dinitial, cu_seqlens, first_chunk, length, chunks, tile_count,
    segment, segments, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """The gradient of the state, last chunk first; programs, layout and LEAN as in `scan`."""
    tile, head, n, s, last, begin, size, chunk = _segment(
        length, chunks, cu_seqlens, first_chunk, tile_count, segment, segments, HV, C, PACKED
    )
    column, number, border = tile * BV, n.to(tl.int64) * HV + head, begin // segment * HV + head
    factors += head * 4 * K
    d_state = tl.zeros([BV, BK], tl.float32)
    if dfinal is not None:
        d_state = tl.trans(load_state(dfinal, number, 1 + s - last, column, K, V, BK, BV))
    if LEAN:
        size = tl.where(s > 0, size, 0)
    elif crossing is not None:
        width = tl.where(s < last, V - column, 0)
        d_state += load_rows(crossing, border * V + column, width, K, 0, K, BV, BK)
    for i in range(0, tl.cdiv(size, C)):
        offset = chunk_offset(tl.cdiv(size, C) - 1 - i, size, C)
        row, count = begin + offset, tl.minimum(size - offset, C)
        low = d_state.to(DT)
        if not LEAN:
            place = (chunk + offset // C).to(tl.int64) * HV + head
            store_rows(leaving, low, place * V + column, V - column, K, 0, K, BV, BK)
        writes = load_rows(factors + 2 * K, row, count, HV * 4 * K, 0, K, C, BK)
        d_known = tl.dot(low, tl.trans(writes), input_precision=PRECISION).to(DT)
        grad = tl.trans(load_rows(do + head * V, row, count, HV * V, column, V, C, BV)).to(DT)
        queries = load_rows(factors + K, row, count, HV * 4 * K, 0, K, C, BK)
        reads = load_rows(factors, row, count, HV * 4 * K, 0, K, C, BK)
        d_state *= decay_of(load_last(sums + head * K, row, count, HV * K, 0, K, BK))[None, :]
        d_state = tl.dot(grad, queries, acc=d_state, input_precision=PRECISION)
        d_state = tl.dot(d_known, reads, acc=d_state, input_precision=PRECISION)
    if LEAN:
        width = tl.where(size > 0, V - column, 0)
        store_rows(crossing, d_state, (border - HV) * V + column, width, K, 0, K, BV, BK)
    elif dinitial is not None:  # noqa: SIM102
        if s == 0:
            store_state(dinitial, tl.trans(d_state), number, column, K, V, BK, BV)


@triton.jit(do_not_specialize=SIZES[:2])
def pairs(
    v, squares, factors, u, entering, leaving, o, do, dx, dv, d_squares, products, starts, counts, length, chunks,
    scale, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NORM: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Through the inverse, to v and to the scores; one program per chunk and value head."""
    SQUARES: tl.constexpr = 2 if DELTA else 4
    chunk = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    row, count = chunk_rows(chunk, length, chunks, starts, counts, C, PACKED)
    number = chunk.to(tl.int64) * HV + head
    factors += head * 4 * K
    squares += head * SQUARES * C
    q_b = tl.zeros([C, C], tl.float32)
    r_b = tl.zeros([C, C], tl.float32)
    q_k = tl.zeros([C, C], tl.float32)
    r_k = tl.zeros([C, C], tl.float32)
    by_query = tl.zeros([C], tl.float32)
    by_key = tl.zeros([C], tl.float32)
    by_write = tl.zeros([C], tl.float32)
    for column in range(0, V, BV):
        grad = load_rows(do + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        value = load_rows(v + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        mix = load_rows(squares, row, count, HV * SQUARES * C, 0 if DELTA else 2 * C, SQUARES * C, C, C)
        scores = tl.trans(load_rows(squares, row, count, HV * SQUARES * C, C, SQUARES * C, C, C))
        write = tl.dot(mix, value, input_precision=PRECISION)
        d_value = tl.dot(scores, grad, input_precision=PRECISION)
        if not DELTA:
            by_writes = tl.trans(load_rows(squares, row, count, HV * SQUARES * C, 3 * C, SQUARES * C, C, C))
            d_x = tl.dot(by_writes, grad, input_precision=PRECISION)
            d_write = tl.zeros([C, BV], tl.float32)
        present = tl.where(count > 0, V - column, 0)
        for first in range(0, K, BK):
            before = tl.trans(load_rows(entering, number * V + column, present, K, first, K, BV, BK))
            after = tl.trans(load_rows(leaving, number * V + column, present, K, first, K, BV, BK))
            reads = load_rows(factors, row, count, HV * 4 * K, first, K, C, BK)
            kept = load_rows(factors + 3 * K, row, count, HV * 4 * K, first, K, C, BK)
            write = tl.dot(reads, before, acc=write, input_precision=PRECISION)
            d_value = tl.dot(kept, after, acc=d_value, input_precision=PRECISION)
            if not DELTA:
                writes = load_rows(factors + 2 * K, row, count, HV * 4 * K, first, K, C, BK)
                d_write = tl.dot(writes, after, acc=d_write, input_precision=PRECISION)
        store_rows(u + head * V, write, row, count, HV * V, column, V, C, BV)
        store_rows(dv + head * V, d_value, row, count, HV * V, column, V, C, BV)
        if DELTA:
            d_x = d_value.to(DT)
        else:
            solved = tl.trans(load_rows(squares, row, count, HV * SQUARES * C, 0, C, C, C))
            d_x = tl.dot(solved, d_write.to(DT), acc=d_x, input_precision=PRECISION).to(DT)
            store_rows(dx + head * V, d_x, row, count, HV * V, column, V, C, BV)
        tl.debug_barrier()
        writes = load_rows(u + head * V, row, count, HV * V, column, V, C, BV)
        q_b += tl.dot(grad, tl.trans(writes), input_precision=PRECISION)
        r_b += tl.dot(d_x, tl.trans(writes), input_precision=PRECISION)
        if DELTA:
            wide = d_x.to(tl.float32)
            by_write += tl.sum(wide * write, 1)
            if NORM:
                out = load_rows(o + head * V, row, count, HV * V, column, V, C, BV).to(tl.float32)
                by_query += tl.sum(out * grad.to(tl.float32), 1)
                by_key += tl.sum(wide * (2 * write - value.to(tl.float32)), 1)
        else:
            q_k += tl.dot(grad, tl.trans(value), input_precision=PRECISION)
            r_k += tl.dot(d_x, tl.trans(value), input_precision=PRECISION)
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
def _across(
    squares, row, count, stride, seen, left, read_left, right, C: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q and r and of b (or k) from the scores of one level, and what the last send."""
    r = tl.arange(0, C)
    other = tl.where(r[:, None] == r[None, :], 0.0, 1.0)
    mirrored = tl.trans(seen)
    square = load_rows(squares, row, count, stride, 0, C, C, C)
    by_query = tl.dot(tl.where(seen, square, 0.0).to(DT), right, input_precision=PRECISION)
    d_right = tl.dot(tl.where(mirrored, square, 0.0).to(DT), left, input_precision=PRECISION)
    square = load_rows(squares + C, row, count, stride, 0, C, C, C) * other
    by_read = tl.dot(tl.where(seen, square, 0.0).to(DT), right, input_precision=PRECISION)
    d_right = tl.dot(tl.where(mirrored, square, 0.0).to(DT), read_left, acc=d_right, input_precision=PRECISION)
    return by_query, by_read, d_right, right.to(tl.float32) * d_right


@triton.jit(do_not_specialize=SIZES)
def gradients(
    q, k, v, a, b, beta, sums, norms, u, entering, leaving, do, dx, d_squares, products, dq, dk, da, db, dbeta,
    ddecay, starts, counts, length, chunks, tile_count, scale, limit, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NORM: tl.constexpr, DELTA: tl.constexpr,
    DECAY: tl.constexpr,
):  # fmt: skip
    """To all that K and the chunks hold; one program per chunk, value head and tile of K."""
    PAIRS: tl.constexpr = 2 if DELTA else 4
    pid = tl.program_id(0)
    first = (pid % tile_count) * BK
    chunk = pid // tile_count // HV
    head = pid // tile_count % HV
    row, count = chunk_rows(chunk, length, chunks, starts, counts, C, PACKED)
    state = (chunk.to(tl.int64) * HV + head) * V
    d_query = tl.zeros([C, BK], tl.float32)
    d_key = tl.zeros([C, BK], tl.float32)
    d_read = tl.zeros([C, BK], tl.float32)
    d_write = tl.zeros([C, BK], tl.float32)
    passing = tl.zeros([BK], tl.float32)
    for column in range(0, V, BV):
        grad = load_rows(do + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        d_x = load_rows(dx + head * V, row, count, HV * V, column, V, C, BV)
        writes = load_rows(u + head * V, row, count, HV * V, column, V, C, BV)
        present = tl.where(count > 0, V - column, 0)
        before = load_rows(entering, state + column, present, K, first, K, BV, BK)
        after = load_rows(leaving, state + column, present, K, first, K, BV, BK)
        passing += tl.sum(before.to(tl.float32) * after.to(tl.float32), 0)
        d_query += tl.dot(grad, before, input_precision=PRECISION)
        d_read += tl.dot(d_x, before, input_precision=PRECISION)
        d_write += tl.dot(writes, after, input_precision=PRECISION)
        if not DELTA:
            value = load_rows(v + head * V, row, count, HV * V, column, V, C, BV).to(DT)
            d_key += tl.dot(value, after, input_precision=PRECISION)
    inputs = (q, k, a, b, beta, norms)
    r = tl.arange(0, C)
    i = r[:, None]
    j = r[None, :]
    stride = HV * K
    square_stride = HV * PAIRS * C
    sums += head * K
    d_squares += head * PAIRS * C
    query, key, read, write = load_sides(inputs, row, count, H, HV, head, first, K, C, BK, NORM, DELTA)
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

    mild = tl.min(last) >= -limit
    for level in range(tl.where(mild, LEVELS - 1, -1), LEVELS):
        again = row + (level + 1 >> 8)  # as in `prepare`
        query, key, read, write = load_sides(inputs, again, count, H, HV, head, first, K, C, BK, NORM, DELTA)
        sum, met = load_sums(sums, again, count, stride, first, K, C, BK, DELTA)
        if mild:
            near, met_near, far = mild_decays(sum, met, last, DELTA)
            seen = i >= j
        else:
            near, met_near, far, seen = level_decays(sums, sum, met, row, count, stride, first, level, K, C, BK, DELTA)
        left, read_left = (query * near).to(DT), (read * met_near).to(DT)
        by_query, by_read, d_far, flow = _across(
            d_squares, again, count, square_stride, seen, left, read_left, (write * far).to(DT), C, DT, PRECISION
        )
        d_write += far * d_far
        net -= flow
        if not DELTA:
            square, right = d_squares + 2 * C, (key * far).to(DT)
            k_query, k_read, d_far, flow = _across(
                square, again, count, square_stride, seen, left, read_left, right, C, DT, PRECISION
            )
            d_key += far * d_far
            net -= flow
            by_query += k_query
            by_read += k_read
        d_query += near * by_query
        d_read += met_near * by_read
        read_flow = read_left.to(tl.float32) * by_read
        net += left.to(tl.float32) * by_query + read_flow
        if not DELTA:
            d_decay -= read_flow
    if DECAY:
        if DT == tl.bfloat16:  # noqa: SIM300
            high, low = split(net, DT)
            past = tl.where(i <= j, 1.0, 0.0).to(DT)
            d_decay = tl.dot(past, low, acc=tl.dot(past, high, acc=d_decay))
        else:
            d_decay += tl.cumsum(net, 0, reverse=True)
        store_rows(ddecay + head * K, d_decay, row, count, stride, first, K, C, BK)
    if DELTA:
        query, key, _, _ = load_sides(
            inputs, row + (tile_count >> 16), count, H, HV, head, first, K, C, BK, NORM, DELTA
        )
        strength = load_gate(beta, row, count, HV, head, C)
        # u.dx is beta times the gradient and keeps more digits than the other way to it, a sum over K.
        steady = tl.abs(strength) > 1e-20
        by_write = load_gate(products, row, count, 3 * HV, 3 * head + 2, C) / tl.where(steady, strength, 1.0)
        by_write = tl.where(steady, tl.where(first == 0, by_write, 0.0), tl.sum(key * d_write, 1))
        tl.store(dbeta + ((row + r) * HV + head) * tile_count + pid % tile_count, by_write, mask=r < count)
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
