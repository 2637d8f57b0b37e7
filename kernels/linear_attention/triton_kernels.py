# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of linear attention. With b the running sum of the log decays in a chunk and a = b - log gain,
    o_i = exp(b_i) q_i S_0 + sum over j <= i of exp(b_i - a_j) (q_i . k_j) v_j,    S_C = exp(b_C) S_0 + sum of
    exp(b_C - a_j) k_j^T v_j,
so `walk` carries the state through a segment of chunks in registers, and backwards with (k, q, do) for (q, k, v) it
carries the gradient of the state and yields dv. A decay per channel factors at the start and the end of a chunk that
decays little, else at the middle of ever larger blocks: `scores` puts it into q (reader x), k (writer y) and the score
matrix, and the same `walk` needs none.

The log decay of token t gets what passes it: pairs in the chunk of one token before t and one from t on, reads of S_0
from t on, writes before t that reach the end, and <S_0, dS_C>. Pairs on one side of t cancel to the last digit.

Shapes: B batch, T tokens, C tokens of a chunk, segments of SEGMENT tokens, H key heads, HV value heads, K and V head
widths, BK and BV tiles of them; sums and sources [B, T, HV] (b and a), or sums [B, T, HV, K] per channel; states [.,
HV, K, V], with NORM one more column, the sum of the keys (`states` in chunks have eight, to be aligned); x, y, z, out
are q, k, v, o or k, q, do, dv.
"""

import triton
import triton.language as tl

from zoo.kernels.tiles import chunk_offset, chunk_rows, load_gate, load_rows, load_sums, sequence_rows, store_rows

SIZES = ["length", "segments", "per", "tiles"]


@triton.jit
def _place(x, number, column, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Where [BK, BV] of state `number` (64-bit) lies, rows of W, and which of it exists."""
    r = tl.arange(0, BK)
    c = column + tl.arange(0, BV)
    return x + number * (K * W) + (r[:, None] * W + c[None, :]), (r < K)[:, None] & (c < V)[None, :]


@triton.jit
def _load_factors(sums, sources, row, count, HV, head, C: tl.constexpr, DECAY: tl.constexpr):
    """b [C], its last, and a [C]; -inf for a token that writes nothing would be a = inf."""
    b, last = load_sums(sums, row, count, HV, head, C, DECAY == 1)
    a = b
    if sources is not None:
        a = tl.where(tl.arange(0, C) < count, load_gate(sources, row, count, HV, head, C), last)
    return b, last, a


@triton.jit
def _exp(x):
    """In the precision of the sums, and then in fp32."""
    return tl.exp(x).to(tl.float32)


@triton.jit
def _between(b, a, scale, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[i, j] (TRANSPOSED: [j, i]) of scale exp(b_i - a_j) for j <= i; zero elsewhere."""
    r = tl.arange(0, C)
    if TRANSPOSED:
        gap = tl.where(r[:, None] <= r[None, :], b[None, :] - a[:, None], float("-inf"))
    else:
        gap = tl.where(r[:, None] >= r[None, :], b[:, None] - a[None, :], float("-inf"))
    return scale * _exp(gap)


@triton.jit
def _apply(matrix, x, DT: tl.constexpr):
    """matrix @ x for a vector in fp32, of which two parts in bf16 keep 16 bits."""
    if DT.is_bf16():
        c = tl.arange(0, 16)[None, :]
        high = x.to(DT).to(tl.float32)
        parts = tl.where(c == 0, high[:, None], tl.where(c == 1, (x - high)[:, None], 0.0))
        result = tl.sum(tl.dot(matrix, parts.to(DT)), 1)
    else:
        result = tl.sum(matrix.to(tl.float32) * x[None, :], 1)
    return result


@triton.jit(do_not_specialize=SIZES)
def prepare(
    decay, gain, sums, sources, starts, counts, length, segments, step, HV: tl.constexpr, C: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """sums and sources, one program per segment and value head; `step` is 0 for a decay per head. Log decays are
    bounded below where exp is zero anyway, so that -1e4 does not swamp the digits of the others."""
    head = tl.program_id(0) % HV
    row, count = chunk_rows(tl.program_id(0) // HV, length, segments, starts, counts, SEGMENT, starts is not None)
    r = tl.arange(0, SEGMENT // C)[:, None] * C + tl.arange(0, C)[None, :]
    token = tl.load(decay + (row + r) * step + head, mask=r < count, other=0.0)
    sum = tl.cumsum(tl.maximum(token, -120.0).to(sums.dtype.element_ty), 1)
    place = (row + r) * HV + head
    tl.store(sums + place, sum, mask=r < count)
    if gain is not None:
        written = tl.load(gain + place, mask=r < count, other=0.0).to(sums.dtype.element_ty)
        tl.store(sources + place, sum - written, mask=r < count)


@triton.jit(do_not_specialize=SIZES)
def walk(
    x, y, z, sums, sources, scores, out, normal, entering, leaving, totals, states,
    starts, counts, length, segments, tiles, scale, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SEGMENT: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program per segment, value head and tile of V, from the state `entering` (or zero) to the one `leaving`. What
    is None is not computed: `out` (and with NORM `normal`, which REVERSE reads as a gradient), `states` before each
    chunk, `totals` of the log decay in a segment. DECAY: 0 none, 1 per token, 2 per channel."""
    pid = tl.program_id(0)
    column = (pid % tiles) * BV
    segment = pid // tiles // HV
    head = pid // tiles % HV
    key_head = head // (HV // H)
    W: tl.constexpr = V + NORM
    begin, size = chunk_rows(segment, length, segments, starts, counts, SEGMENT, starts is not None)
    number = segment.to(tl.int64) * HV + head
    c = tl.arange(0, BK)
    once = (c < K) & (c * 0 == column)  # for what has no columns, in the first tile
    state = tl.zeros([BK, BV], tl.float32)
    n = tl.zeros([BK], tl.float32)
    if entering is not None:
        place, seen = _place(entering, number, column, K, V, W, BK, BV)
        state = tl.load(place, mask=seen, other=0.0)
        if NORM:
            n = tl.load(entering + (number * K + c) * W + V, mask=c < K, other=0.0)
    passed = tl.zeros([BK], tl.float32)
    chunks = tl.cdiv(size, C)
    for step in tl.range(0, chunks, num_stages=STAGES):
        i = chunks - 1 - step if REVERSE else step
        offset = chunk_offset(i, size, C)
        row = begin + offset
        count = tl.minimum(size - offset, C)
        ys = load_rows(y + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
        zs = load_rows(z + head * V, row, count, HV * V, column, V, C, BV)
        b, last, a = _load_factors(sums, sources, row, count, HV, head, C, DECAY)
        if states is not None:
            slot = (begin // C + segment + i) * HV + head
            spot, kept = _place(states, slot, column, K, V, V + 8 * NORM, BK, BV)
            tl.store(spot, state.to(DT), mask=kept)
            if NORM:
                tl.store(states + (slot * K + c) * (V + 8) + V, n.to(states.dtype.element_ty), mask=once)
        if REVERSE:
            outer = _exp(last - a)
            inner = _exp(b) * scale
        else:
            outer = _exp(b) * scale
            inner = _exp(last - a)
        if out is not None:
            xs = load_rows(x + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
            if DECAY == 2:
                inside = load_rows(scores + head * C, row, count, HV * C, 0, C, C, C).to(DT)
                if REVERSE:
                    inside = tl.trans(inside)
            elif NORM and not REVERSE:  # the normaliser may be a small difference: all digits of fp32
                inside = tl.dot(xs, tl.trans(ys), input_precision="ieee") * _between(b, a, scale, C, REVERSE)
            else:
                inside = tl.dot(xs, tl.trans(ys), input_precision=PRECISION) * _between(b, a, scale, C, REVERSE)
            result = outer[:, None] * tl.dot(xs, state.to(DT), input_precision=PRECISION)
            result = tl.dot(inside.to(DT), zs.to(DT), result, input_precision=PRECISION)
            store_rows(out + head * V, result, row, count, HV * V, column, V, C, BV)
            if NORM and not REVERSE:
                sum = outer * _apply(xs, n, DT) + tl.sum(inside.to(tl.float32), 1)
                r = tl.arange(0, C)
                tl.store(normal + (row + r) * HV + head, sum, mask=(r < count) & (r * 0 == column))
        if DECAY == 2:
            last = tl.load(sums + ((row + count - 1) * HV + head) * K + c, mask=c < K, other=0.0)
        rate = _exp(last) + c * 0
        write = (inner[:, None] * zs.to(tl.float32)).to(DT)
        state = tl.dot(tl.trans(ys), write, state * rate[:, None], input_precision=PRECISION)
        if NORM:
            if REVERSE:
                inner *= load_gate(normal, row, count, HV, head, C)
            n = n * rate + _apply(tl.trans(ys), inner, DT)
        passed += last.to(tl.float32)
    if leaving is not None:
        end, exists = _place(leaving, number, column, K, V, W, BK, BV)
        tl.store(end, state, mask=exists)
        if NORM:
            tl.store(leaving + (number * K + c) * W + V, n, mask=once)
    if totals is not None:
        if DECAY == 2:
            tl.store(totals + number * K + c, passed, mask=once)
        else:
            tl.store(totals + number + c * 0, passed, mask=once & (c == 0))


@triton.jit(do_not_specialize=SIZES)
def carry(
    initial, states, totals, final, cu_seqlens, first, length, segments, HV: tl.constexpr, K: tl.constexpr,
    W: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """From the states that segments leave when they start from nothing, in place, to those that enter them; one program
    per sequence, value head and BLOCK numbers of a state."""
    BLOCKS: tl.constexpr = (K * W + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    n = pid // BLOCKS // HV
    head = pid // BLOCKS % HV
    _, size, segment = sequence_rows(n, length, segments, cu_seqlens, first, cu_seqlens is not None)
    c = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = c < K * W
    place = (n.to(tl.int64) * HV + head) * (K * W) + c
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state = tl.load(initial + place, mask=inside, other=0.0)
    count = tl.cdiv(size, SEGMENT)
    for step in tl.range(0, count, num_stages=4):  # no state is stored before its load
        number = (segment + (count - 1 - step if REVERSE else step)) * HV + head
        own = tl.load(states + number * (K * W) + c, mask=inside, other=0.0)
        tl.store(states + number * (K * W) + c, state, mask=inside)
        if DECAY == 2:
            state = state * tl.exp(tl.load(totals + number * K + c // W, mask=inside, other=0.0)) + own
        else:
            state = state * tl.exp(tl.load(totals + number)) + own
    tl.store(final + place, state, mask=inside)


@triton.jit
def _chunk(number, length, segments, per, starts, counts, C: tl.constexpr, SEGMENT: tl.constexpr):
    """First row and tokens of a chunk, `per` of them in every segment, and the place of its state among `states`."""
    segment = number // per
    i = number % per
    begin, size = chunk_rows(segment, length, segments, starts, counts, SEGMENT, starts is not None)
    return begin + i * C, tl.minimum(size - i * C, C), begin // C + segment + i


@triton.jit
def _meet(b, sums, row, count, stride, column, level, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """Decays [C, BK] from some point to q and from k to it, and the pairs of tokens [C, C] that meet there: at the
    border inside each block of 2 << level tokens those of its halves, or (level -1) tokens and themselves."""
    r = tl.arange(0, C)
    c = column + tl.arange(0, BK)
    half = r >> tl.maximum(level, 0)
    border = tl.minimum(tl.where(level < 0, r, ((half | 1) << tl.maximum(level, 0)) - 1), count - 1)
    place = sums + row * stride + (border[:, None] * stride + c[None, :])
    gap = (b - tl.load(place, mask=(c < K)[None, :], other=0.0)).to(tl.float32)
    seen = (r[:, None] >= r[None, :]) & ((half[:, None] ^ half[None, :]) == tl.where(level < 0, 0, 1))
    return tl.exp(tl.minimum(gap, 0.0)), tl.exp(tl.minimum(-gap, 0.0)), seen


@triton.jit(do_not_specialize=SIZES)
def scores(
    q, k, decay, q_faded, k_faded, sums, out, starts, counts, length, segments, per, step, scale, limit,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, SEGMENT: tl.constexpr,
    LEVELS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums, q exp(b), k exp(b_C - b) and the scores inside a chunk under a decay per channel; one program per chunk and
    value head; `step` is 0 for a decay without tokens."""
    head = tl.program_id(0) % HV
    key_head = head // (HV // H)
    row, count, _ = _chunk(tl.program_id(0) // HV, length, segments, per, starts, counts, C, SEGMENT)
    if count > 0:
        r = tl.arange(0, C)
        result = tl.zeros([C, C], tl.float32)
        for column in range(0, K, BK):
            c = column + tl.arange(0, BK)
            place = decay + head * K + row * step + (r[:, None] * step + c[None, :])
            token = tl.load(place, mask=(r < count)[:, None] & (c < K)[None, :], other=0.0)
            queries = load_rows(q + key_head * K, row, count, H * K, column, K, C, BK)
            keys = load_rows(k + key_head * K, row, count, H * K, column, K, C, BK)
            token = tl.maximum(token, -120.0).to(sums.dtype.element_ty)
            b = tl.cumsum(token, 0)
            last = tl.sum(token, 0)
            store_rows(sums + head * K, b, row, count, HV * K, column, K, C, BK)
            left = queries.to(tl.float32) * tl.exp(b.to(tl.float32))
            right = keys.to(tl.float32) * tl.exp((last[None, :] - b).to(tl.float32))
            store_rows(q_faded + head * K, left, row, count, HV * K, column, K, C, BK)
            store_rows(k_faded + head * K, right, row, count, HV * K, column, K, C, BK)
            if tl.min(last) >= -limit:
                lift = tl.exp(last.to(tl.float32) * -0.5)[None, :]
                result += tl.dot((left * lift).to(DT), tl.trans((right * lift).to(DT)), input_precision=PRECISION)
                result = tl.where(r[:, None] >= r[None, :], result, 0.0)
            else:
                tl.debug_barrier()  # the sums are read back from other threads
                for level in range(-1, LEVELS):
                    again = row + (level + 1 >> 8)  # the same, unknown to compilers: to load again beats to hold
                    b = load_rows(sums + head * K, again, count, HV * K, column, K, C, BK)
                    queries = load_rows(q + key_head * K, again, count, H * K, column, K, C, BK)
                    keys = load_rows(k + key_head * K, again, count, H * K, column, K, C, BK)
                    near, far, seen = _meet(b, sums + head * K, again, count, HV * K, column, level, K, C, BK)
                    near, far = (queries * near).to(DT), (keys * far).to(DT)
                    result += tl.where(seen, tl.dot(near, tl.trans(far), input_precision=PRECISION), 0.0)
        store_rows(out + head * C, scale * result, row, count, HV * C, 0, C, C, C)


@triton.jit(do_not_specialize=SIZES)
def gradients(
    q, k, x, y, v, do, sums, sources, d_normal, entering, leaving, dq, dk, ddecay, dgain,
    starts, counts, length, segments, per, tiles, scale, limit, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SEGMENT: tl.constexpr,
    LEVELS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq, dk and, unless None, the gradients of the log decay and gain of every token: per channel, or the share that a
    tile of K has in them. One program per chunk, value head and tile of K. `entering` has the state before each chunk,
    `leaving` the gradient of the state after it; where that is None, dq alone."""
    pid = tl.program_id(0)
    tile = pid % tiles
    column = tile * BK
    head = pid // tiles % HV
    key_head = head // (HV // H)
    HX: tl.constexpr = HV if DECAY == 2 else H  # of readers x and writers y
    x_head = head if DECAY == 2 else key_head
    W: tl.constexpr = V + 8 * NORM
    row, count, slot = _chunk(pid // tiles // HV, length, segments, per, starts, counts, C, SEGMENT)
    if count > 0:
        r = tl.arange(0, C)
        c = column + tl.arange(0, BK)
        base = (slot * HV + head) * (K * W)
        d_query = tl.zeros([C, BK], tl.float32)
        d_key = tl.zeros([C, BK], tl.float32)
        outputs = tl.zeros([C, C], tl.float32)
        inputs = tl.zeros([C, C], tl.float32)
        carried = tl.zeros([BK], tl.float32)
        for start in tl.range(0, V, BV, num_stages=STAGES):
            e = start + tl.arange(0, BV)
            seen = (c < K)[:, None] & (e < V)[None, :]
            grad = load_rows(do + head * V, row, count, HV * V, start, V, C, BV).to(DT)
            values = load_rows(v + head * V, row, count, HV * V, start, V, C, BV).to(DT)
            before = tl.load(entering + base + (c[:, None] * W + e[None, :]), mask=seen, other=0.0).to(DT)
            d_query += tl.dot(grad, tl.trans(before), input_precision=PRECISION)
            outputs += tl.dot(grad, tl.trans(values), input_precision=PRECISION)
            if leaving is not None:
                after = tl.load(leaving + base + (c[:, None] * W + e[None, :]), mask=seen, other=0.0).to(DT)
                d_key += tl.dot(values, tl.trans(after), input_precision=PRECISION)
                inputs += tl.dot(values, tl.trans(grad), input_precision=PRECISION)
                carried += tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)
        if NORM:
            ones = load_gate(d_normal, row, count, HV, head, C)
            n = tl.load(entering + base + c * W + V, mask=c < K, other=0.0).to(tl.float32)
            dn = tl.load(leaving + base + c * W + V, mask=c < K, other=0.0).to(tl.float32)
            d_query += ones[:, None] * n[None, :]
            outputs += ones[:, None]
            d_key += dn[None, :]
            inputs += ones[None, :]
            carried += n * dn
        readers = load_rows(x + x_head * K, row, count, HX * K, column, K, C, BK).to(DT)
        writers = load_rows(y + x_head * K, row, count, HX * K, column, K, C, BK).to(DT)
        if DECAY < 2:
            b, last, a = _load_factors(sums, sources, row, count, HV, head, C, DECAY)
            d_query = d_query * (scale * _exp(b))[:, None]
            d_key = d_key * _exp(last - a)[:, None]
            if ddecay is not None:
                read = tl.sum(readers.to(tl.float32) * d_query, 1)
                written = tl.sum(writers.to(tl.float32) * d_key, 1)
            outputs = outputs * _between(b, a, scale, C, False)
            inputs = inputs * _between(b, a, scale, C, True)
            d_query = tl.dot(outputs.to(DT), writers, d_query, input_precision=PRECISION)
            d_key = tl.dot(inputs.to(DT), readers, d_key, input_precision=PRECISION)
            if ddecay is not None:
                place = ((row + r) * HV + head) * tiles + tile
                outputs *= tl.dot(readers, tl.trans(writers), input_precision=PRECISION)
                pairs = tl.where(r[:, None] > r[None, :], outputs, 0.0)
                read += tl.sum(pairs, 1) - tl.sum(pairs, 0)
                d_decay = tl.sum(tl.where(r[:, None] >= r[None, :], read[:, None], written[:, None]), 0)
                tl.store(ddecay + place, d_decay + tl.sum(_exp(last) * carried, 0), mask=r < count)
                if dgain is not None:
                    tl.store(dgain + place, written + tl.sum(outputs, 0), mask=r < count)
        else:
            last = tl.load(sums + ((row + count - 1) * HV + head) * K + c, mask=c < K, other=0.0)
            end = tl.exp(last.to(tl.float32))
            carried *= end
            if tl.min(last) >= -limit:  # readers and writers bear exp(b) and exp(b_C - b): pairs lack exp(-b_C)
                weights = tl.where(r[:, None] >= r[None, :], scale * outputs, 0.0).to(DT)
                d_query = tl.dot(weights, writers, d_query * (scale * end)[None, :], input_precision=PRECISION)
                carried += tl.sum(writers.to(tl.float32) * d_key, 0)
                weights = tl.where(r[:, None] <= r[None, :], scale * inputs, 0.0).to(DT)
                d_key = tl.dot(weights, readers, d_key * end[None, :], input_precision=PRECISION)
                if ddecay is not None:  # what does not pass a token cancels, the same digits from both sides
                    d_decay = readers.to(tl.float32) * d_query - writers.to(tl.float32) * d_key
                    d_decay = tl.cumsum(d_decay, 0, reverse=True) / end[None, :] + carried[None, :]
                    store_rows(ddecay + head * K, d_decay, row, count, HV * K, column, K, C, BK)
                b = load_rows(sums + head * K, row, count, HV * K, column, K, C, BK)
                d_query *= tl.exp((b - last[None, :]).to(tl.float32))
                d_key *= tl.exp(-b.to(tl.float32))
            else:
                b = load_rows(sums + head * K, row, count, HV * K, column, K, C, BK)
                flow = scale * readers.to(tl.float32) * d_query
                d_decay = writers.to(tl.float32) * d_key
                d_decay = tl.cumsum(d_decay, 0) - d_decay + carried[None, :]
                d_query = d_query * (scale * tl.exp(b.to(tl.float32)))
                d_key = d_key * tl.exp(tl.minimum(last[None, :] - b, 0.0).to(tl.float32))
                for level in range(-1, LEVELS):
                    again = row + (level + 1 >> 8)
                    b = load_rows(sums + head * K, again, count, HV * K, column, K, C, BK)
                    left = load_rows(q + key_head * K, again, count, H * K, column, K, C, BK)
                    right = load_rows(k + key_head * K, again, count, H * K, column, K, C, BK)
                    near, far, seen = _meet(b, sums + head * K, again, count, HV * K, column, level, K, C, BK)
                    left, right = (left * near).to(DT), (right * far).to(DT)
                    weights = tl.where(seen, scale * outputs, 0.0).to(DT)
                    by_query = tl.dot(weights, right, input_precision=PRECISION)
                    weights = tl.where(tl.trans(seen), scale * inputs, 0.0).to(DT)
                    by_key = tl.dot(weights, left, input_precision=PRECISION)
                    d_query += near * by_query
                    d_key += far * by_key
                    flow += left.to(tl.float32) * by_query - right.to(tl.float32) * by_key
                if ddecay is not None:
                    d_decay += tl.cumsum(flow, 0, reverse=True)
                    store_rows(ddecay + head * K, d_decay, row, count, HV * K, column, K, C, BK)
        store_rows(dq + head * K, d_query, row, count, HV * K, column, K, C, BK)
        if leaving is not None:
            store_rows(dk + head * K, d_key, row, count, HV * K, column, K, C, BK)
