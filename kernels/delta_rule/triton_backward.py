# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the delta rule, backward: two launches.

With R = beta x and T = (I + diag(beta) N)^-1 = I - diag(beta) Z, the writes are u = T R, and
    du = P^T do + Ke dS_1,    dR = T^T du,    dv = beta dR,    dbeta = rowsum(dR * y),
    dS_0 = exp(b_C) dS_1 + (exp(b) q)^T do - (exp(b) k)^T dv,
and the gradient of the triangular matrix diag(beta) N is -dR u^T: the inverse is not differentiated.
The running sums get db = q.dq + k.dk_read - k.dk_write, where dk_read is the gradient of k as reader of the state and
dk_write as its writer.

No accumulator of a product is transposed: on Hopper some releases of triton compile that into wrong numbers. Where a
transposed product is needed, it is computed from the inputs.

Shapes: as in triton_forward; dr [B, T, HV, V]; leaving [chunks, HV, K, V] is the gradient of the state after a chunk.
"""

import triton
import triton.language as tl

from zoo.kernels.delta_rule.triton_forward import SIZES
from zoo.kernels.tiles import (
    chunk_rows,
    decay_between,
    load_gate,
    load_norm,
    load_rows,
    load_state,
    load_sums,
    sequence_rows,
    store_rows,
    store_state,
)


@triton.jit(do_not_specialize=SIZES)
def scan_backward(
    q, k, beta, z, sums, q_norms, k_norms, do, dr, leaving, dfinal, dinitial,
    cu_seqlens, first_chunk, length, chunks, H, HV, tiles, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The gradient of the state, last chunk first; one program per sequence, value head and tile of V."""
    pid = tl.program_id(0)
    column = (pid % tiles) * BV
    n = pid // tiles // HV
    head = pid // tiles % HV
    key_head = head // (HV // H)
    begin, size, chunk = sequence_rows(n, length, chunks, cu_seqlens, first_chunk, PACKED)
    number = n.to(tl.int64) * HV + head
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
        queries = load_rows(q + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
        keys = load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
        grad = load_rows(do + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        inverse = load_rows(z + head * C, row, count, HV * C, 0, C, C, C).to(DT)
        strength = load_gate(beta, row, count, HV, head, C)
        q_norm = load_norm(q_norms, row, count, HV, head, C, NORM) * scale
        k_norm = load_norm(k_norms, row, count, HV, head, C, NORM)
        sum, last = load_sums(sums, row, count, HV, head, C, DECAY)
        from_start = tl.exp(sum.to(tl.float32))
        to_end = tl.exp((last - sum).to(tl.float32))
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * k_norm[:, None] * q_norm[None, :]
        scores = scores * decay_between(sum, count, C, DECAY, True)
        d_write = tl.dot(scores.to(DT), grad, input_precision=PRECISION)
        d_write += (k_norm * to_end)[:, None] * tl.dot(keys, low, input_precision=PRECISION)
        back = tl.dot(tl.trans(inverse), (strength[:, None] * d_write).to(DT), input_precision=PRECISION)
        d_right = d_write - back
        store_rows(dr + head * V, d_right, row, count, HV * V, column, V, C, BV)
        d_read = ((q_norm * from_start)[:, None] * grad.to(tl.float32)).to(DT)
        d_error = ((k_norm * from_start * strength)[:, None] * d_right).to(DT)
        d_state = d_state * tl.exp(last.to(tl.float32))
        d_state += tl.dot(tl.trans(queries), d_read, input_precision=PRECISION)
        d_state -= tl.dot(tl.trans(keys), d_error, input_precision=PRECISION)
    if INITIAL:
        store_state(dinitial, d_state, number, column, K, V, BK, BV)


@triton.jit(do_not_specialize=SIZES[:-1])
def gradients(
    q, k, beta, sums, q_norms, k_norms, y, entering, leaving, do, dr, dq, dk, dv, dbeta, ddecay,
    starts, counts, length, chunks, H, HV, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """All that the chunks yield on their own; one program per chunk and value head."""
    chunk = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    key_head = head // (HV // H)
    row, count = chunk_rows(chunk, length, chunks, starts, counts, C, PACKED)
    number = chunk.to(tl.int64) * HV + head
    strength = load_gate(beta, row, count, HV, head, C)
    q_norm = load_norm(q_norms, row, count, HV, head, C, NORM)
    k_norm = load_norm(k_norms, row, count, HV, head, C, NORM)
    sum, last = load_sums(sums, row, count, HV, head, C, DECAY)
    from_start = tl.exp(sum.to(tl.float32))
    written = k_norm * strength
    r = tl.arange(0, C)

    # Tokens as readers of the state and of the writes before them.
    d_query = tl.zeros([C, BK], tl.float32)
    d_read = tl.zeros([C, BK], tl.float32)  # minus the gradient
    outputs = tl.zeros([C, C], tl.float32)
    solves = tl.zeros([C, C], tl.float32)
    d_strength = tl.zeros([C], tl.float32)
    for column in range(0, V, BV):
        grad = load_rows(do + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        right = load_rows(dr + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        errors = load_rows(y + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        before = load_state(entering, number, count, column, K, V, BK, BV).to(DT)
        d_query += tl.dot(grad, tl.trans(before), input_precision=PRECISION)
        d_read += tl.dot(right, tl.trans(before), input_precision=PRECISION)
        outputs += tl.dot(grad, tl.trans(errors), input_precision=PRECISION)
        solves += tl.dot(right, tl.trans(errors), input_precision=PRECISION)
        wide = right.to(tl.float32)
        d_strength += tl.sum(wide * errors.to(tl.float32), 1)
        store_rows(dv + head * V, strength[:, None] * wide, row, count, HV * V, column, V, C, BV)
    tl.store(dbeta + (row + r) * HV + head, d_strength, mask=r < count)
    inside = decay_between(sum, count, C, DECAY, False) * written[None, :]
    outputs = outputs * inside * (scale * q_norm)[:, None]
    # No decay lies between a token and itself: these terms stay out of the sums that must cancel.
    own = tl.sum(tl.where(r[:, None] == r[None, :], outputs, 0.0), 1)
    outputs = tl.where(r[:, None] > r[None, :], outputs, 0.0).to(DT)
    solves = tl.where(r[:, None] > r[None, :], solves * inside * written[:, None], 0.0).to(DT)
    keys = load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
    d_query = d_query * (scale * q_norm * from_start)[:, None] + tl.dot(outputs, keys, input_precision=PRECISION)
    d_read = d_read * (written * from_start)[:, None] + tl.dot(solves, keys, input_precision=PRECISION)
    queries = load_rows(q + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
    wide_q = queries.to(tl.float32)
    wide_k = keys.to(tl.float32)
    by_query = tl.sum(wide_q * d_query, 1)
    by_read = tl.sum(wide_k * d_read, 1)
    d_query += own[:, None] * wide_k
    pair = own * tl.sum(wide_q * wide_k, 1)
    if NORM:
        d_query -= (q_norm * q_norm * (by_query + pair))[:, None] * wide_q
    store_rows(dq + head * K, d_query, row, count, HV * K, 0, K, C, BK)

    # Tokens as writers.
    d_write = tl.zeros([C, BK], tl.float32)
    outputs_t = tl.zeros([C, C], tl.float32)
    solves_t = tl.zeros([C, C], tl.float32)
    carried = tl.zeros([BK], tl.float32)
    for column in range(0, V, BV):
        grad = load_rows(do + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        right = load_rows(dr + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        errors = load_rows(y + head * V, row, count, HV * V, column, V, C, BV).to(DT)
        after = load_state(leaving, number, count, column, K, V, BK, BV).to(DT)
        d_write += tl.dot(errors, tl.trans(after), input_precision=PRECISION)
        outputs_t += tl.dot(errors, tl.trans(grad), input_precision=PRECISION)
        solves_t += tl.dot(errors, tl.trans(right), input_precision=PRECISION)
        if DECAY:
            before = load_state(entering, number, count, column, K, V, BK, BV)
            carried += tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)
    inside = decay_between(sum, count, C, DECAY, True) * written[:, None]
    inside = tl.where(r[:, None] < r[None, :], inside, 0.0)
    outputs_t = (outputs_t * inside * (scale * q_norm)[None, :]).to(DT)
    solves_t = (solves_t * inside * written[None, :]).to(DT)
    d_write = d_write * (written * tl.exp((last - sum).to(tl.float32)))[:, None]
    kept = tl.sum(tl.sum(wide_k * d_write, 1), 0)
    d_write += tl.dot(outputs_t, queries, input_precision=PRECISION)
    d_write -= tl.dot(solves_t, keys, input_precision=PRECISION)
    by_key = tl.sum(wide_k * d_write, 1)
    if DECAY:
        d_sum = by_query - by_read - by_key
        later = tl.where((r[:, None] >= r[None, :]) & (r < count)[:, None], d_sum[:, None], 0.0)
        d_decay = tl.sum(later, 0) + (kept + tl.exp(last.to(tl.float32)) * tl.sum(carried, 0))
        tl.store(ddecay + (row + r) * HV + head, d_decay, mask=r < count)
    d_key = d_write - d_read + own[:, None] * wide_q
    if NORM:
        d_key -= (k_norm * k_norm * (by_key - by_read + pair))[:, None] * wide_k
    store_rows(dk + head * K, d_key, row, count, HV * K, 0, K, C, BK)
