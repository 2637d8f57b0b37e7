# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of diagonal-plus-low-rank transitions, forward: two launches.

Every token reads the state through r and writes u to it through b, a second time v through k:
    dplr: u_i = r_i S, with r = a before the decay of token i;
    delta (DELTA): u_i = v_i + r_i S with r = -k after it, b = beta k, and no second write.
Inside a chunk, with A the scores of reads on earlier writes, u = (I - A)^-1 x = x + Z x, and x is linear in the state
that enters: u = U + W S_0. `prepare` makes all that is free of the state, `scan` runs over the chunks.

Scores hold the decay between two tokens, per channel. They come level by level: between the two halves of each block of
2, 4, .. C tokens the decay factors at the border, into exponents that are never positive and at most one per token.

Shapes: as in tiles; sums [B, T, HV, K], of log decays in the chunk; norms [B, T, HV, 2], of q and k; squares
[B, T, HV, SQUARES C], of Z and the scores q.b, q.k, r.k; factors [B, T, HV, FACTORS K], of W, q from the chunk's start,
b and k to its end; u [B, T, HV, V]; entering [chunks, HV, K, V]. Without a second write the k ones are left out.
"""

import triton
import triton.language as tl

from zoo.kernels.tiles import chunk_rows, load_gate, load_rows, load_state, sequence_rows, store_rows, store_state

# K and V give the alignment of every address; other numbers would only multiply the compilations.
SIZES = ["length", "chunks", "H", "HV", "tiles"]


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
    q, k, a, b, beta, norms, row, count, H, HV, head, column,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """[C, BK] in fp32 of q, k, r and b."""
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
def level_decays(
    sums, sum, met, row, count, stride, column, level,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Decays between each token and the border inside its block of 2 << level tokens, for q, k and b and for r; and
    which tokens come after that border."""
    r = tl.arange(0, C)
    border = ((r >> level) | 1) * (1 << level) - 1
    after = ((r >> level) & 1 == 1)[:, None]
    middle = load_at(sums, row, border, border < count, stride, column, K, BK)
    near = decay_of(tl.where(after, sum - middle, middle - sum))
    if DELTA:
        met_near = near
    else:
        met_near = tl.where(after, decay_of(met - middle), near)
    return near, met_near, after


@triton.jit
def _prefix_sums(
    q, k, decay, sums, norms, row, count, H, HV, head, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
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


@triton.jit(do_not_specialize=SIZES[:-1])
def prepare(
    q, k, v, a, b, beta, decay, sums, norms, squares, factors, u,
    starts, counts, length, chunks, H, HV, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NORM: tl.constexpr, DELTA: tl.constexpr,
    DECAY: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """One program per chunk and value head."""
    SQUARES: tl.constexpr = 2 if DELTA else 4
    FACTORS: tl.constexpr = 3 if DELTA else 4
    chunk = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    row, count = chunk_rows(chunk, length, chunks, starts, counts, C, PACKED)
    _prefix_sums(q, k, decay, sums, norms, row, count, H, HV, head, K, C, BK, PER_TOKEN, PER_CHANNEL, DECAY, NORM)
    sums += head * K
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]

    q_b = tl.zeros([C, C], tl.float32)
    r_b = tl.zeros([C, C], tl.float32)
    q_k = tl.zeros([C, C], tl.float32)
    r_k = tl.zeros([C, C], tl.float32)
    for column in range(0, K, BK):
        query, key, read, write = load_sides(
            q, k, a, b, beta, norms, row, count, H, HV, head, column, K, C, BK, NORM, DELTA
        )
        sum, met = load_sums(sums, row, count, HV * K, column, K, C, BK, DELTA)
        q_b += tl.where(i == j, tl.sum(query * write, 1)[:, None], 0.0)
        if not DELTA:
            q_k += tl.where(i == j, tl.sum(query * key, 1)[:, None], 0.0)
        for level in range(LEVELS):
            near, met_near, _ = level_decays(sums, sum, met, row, count, HV * K, column, level, K, C, BK, DELTA)
            between = tl.where((i >> level) & 1 == 1, i >> level, 0) == (j >> level) + 1
            left = (query * near).to(DT)
            read_left = (read * met_near).to(DT)
            right = tl.trans((write * near).to(DT))
            q_b += tl.where(between, tl.dot(left, right, input_precision=PRECISION), 0.0)
            r_b += tl.where(between, tl.dot(read_left, right, input_precision=PRECISION), 0.0)
            if not DELTA:
                right = tl.trans((key * near).to(DT))
                q_k += tl.where(between, tl.dot(left, right, input_precision=PRECISION), 0.0)
                r_k += tl.where(between, tl.dot(read_left, right, input_precision=PRECISION), 0.0)

    # The inverse of a block from those of its halves: (I + Z) B (I + Z), with B the scores between them.
    z = tl.where((i ^ j) == 1, r_b, 0.0)
    for level in range(1, LEVELS):
        square = tl.where((i >> level) ^ 1 == (j >> level), r_b, 0.0)
        square += tl.dot(z, square, input_precision=PRECISION)
        z += square + tl.dot(square, z, input_precision=PRECISION)
    low = z.to(DT)
    squares += head * SQUARES * C
    store_rows(squares, low, row, count, HV * SQUARES * C, 0, C, C, C)
    store_rows(squares, q_b * scale, row, count, HV * SQUARES * C, C, 2 * C, C, C)
    if not DELTA:
        store_rows(squares, q_k * scale, row, count, HV * SQUARES * C, 2 * C, 3 * C, C, C)
        store_rows(squares, r_k, row, count, HV * SQUARES * C, 3 * C, 4 * C, C, C)

    for column in range(0, K, BK):
        query, key, read, write = load_sides(
            q, k, a, b, beta, norms, row, count, H, HV, head, column, K, C, BK, NORM, DELTA
        )
        sum, met = load_sums(sums, row, count, HV * K, column, K, C, BK, DELTA)
        to_end = decay_of(load_last(sums, row, count, HV * K, column, K, BK)[None, :] - sum)
        read *= decay_of(met)
        read += tl.dot(low, read.to(DT), input_precision=PRECISION)
        place = factors + head * FACTORS * K
        store_rows(place, read, row, count, HV * FACTORS * K, column, K, C, BK)
        query *= decay_of(sum) * scale
        store_rows(place + K, query, row, count, HV * FACTORS * K, column, K, C, BK)
        store_rows(place + 2 * K, write * to_end, row, count, HV * FACTORS * K, column, K, C, BK)
        if not DELTA:
            store_rows(place + 3 * K, key * to_end, row, count, HV * FACTORS * K, column, K, C, BK)
    for column in range(0, V, BV):
        value = load_rows(v + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        if DELTA:
            x = value.to(tl.float32)
        else:
            x = tl.dot(r_k.to(DT), value, input_precision=PRECISION)
            value = x.to(DT)
        x += tl.dot(low, value, input_precision=PRECISION)
        store_rows(u + head * V, x, row, count, HV * V, column, V, C, BV)


@triton.jit(do_not_specialize=SIZES)
def scan(
    v, sums, squares, factors, u, entering, initial, final, o,
    cu_seqlens, first_chunk, length, chunks, HV, tiles,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, DELTA: tl.constexpr,
    INITIAL: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """The state from chunk to chunk, in registers; one program per sequence, value head and tile of V."""
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
    if INITIAL:
        state = load_state(initial, number, 1, column, K, V, BK, BV)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    for i in range(0, tl.cdiv(size, C)):
        row = begin + i * C
        count = tl.minimum(size - i * C, C)
        low = state.to(DT)
        if SAVE:
            store_state(entering, low, (chunk + i) * HV + head, column, K, V, BK, BV)
        reads = load_rows(factors, row, count, HV * FACTORS * K, 0, K, C, BK)
        queries = load_rows(factors + K, row, count, HV * FACTORS * K, 0, K, C, BK)
        writes = load_rows(factors + 2 * K, row, count, HV * FACTORS * K, 0, K, C, BK)
        q_b = load_rows(squares + C, row, count, HV * SQUARES * C, 0, C, C, C)
        last = load_last(sums + head * K, row, count, HV * K, 0, K, BK)
        x = load_rows(u + head * V, row, count, HV * V, column, V, C, BV).to(tl.float32)
        x = (x + tl.dot(reads, low, input_precision=PRECISION)).to(DT)
        result = tl.dot(queries, low, input_precision=PRECISION)
        state = state * decay_of(last)[:, None] + tl.dot(tl.trans(writes), x, input_precision=PRECISION)
        if not DELTA:
            keys = load_rows(factors + 3 * K, row, count, HV * FACTORS * K, 0, K, C, BK)
            q_k = load_rows(squares + 2 * C, row, count, HV * SQUARES * C, 0, C, C, C)
            values = load_rows(v + head * V, row, count, HV * V, column, V, C, BV).to(DT)
            state += tl.dot(tl.trans(keys), values, input_precision=PRECISION)
            result += tl.dot(q_k, values, input_precision=PRECISION)
        result += tl.dot(q_b, x, input_precision=PRECISION)
        if SAVE:
            store_rows(u + head * V, x, row, count, HV * V, column, V, C, BV)
        store_rows(o + head * V, result, row, count, HV * V, column, V, C, BV)
    store_state(final, state, number, column, K, V, BK, BV)
