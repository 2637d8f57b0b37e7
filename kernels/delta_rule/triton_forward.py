# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the delta rule, forward: three launches.

With N_ij = exp(b_i - b_j) (k_i . k_j) for j < i, the errors y that the writes correct solve, inside a chunk,
    y = x - N diag(beta) y,    x_i = v_i - exp(b_i) k_i S_0,
so y = x - Z (beta x) with Z = N (I + diag(beta) N)^-1, strictly lower triangular and free of the state: the identity
part of the inverse is never rounded, and beta = 0 needs no division. The writes are beta y.

Shapes: as in triton_tiles; z [B, T, HV, C], y [B, T, HV, V], entering [chunks, HV, K, V], sums [B, T, HV] (fp64),
q_norms and k_norms [B, T, HV]. q and k enter products unrounded: norms, decays and beta scale rows and columns.
"""

import triton
import triton.language as tl

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

# K and V give the alignment of every address; other numbers would only multiply the compilations.
SIZES = ["length", "chunks", "H", "HV", "tiles"]


@triton.jit
def _store_norm(x, norms, row, count, heads, head, C: tl.constexpr):
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 1) + 1e-6)
    r = tl.arange(0, C)
    tl.store(norms + (row + r) * heads + head, factor, mask=r < count)
    return factor


@triton.jit
def _store_sums(decay, sums, row, count, heads, head, C: tl.constexpr, DECAY: tl.constexpr):
    """Log decays are bounded below where exp is zero anyway, so that -1e4 does not swamp the digits of the others."""
    r = tl.arange(0, C)
    if DECAY == 2:
        step = tl.load(decay + (row + r) * heads + head, mask=r < count, other=0.0)
    elif DECAY == 1:
        step = tl.load(decay + head + r * 0)
    else:
        step = tl.full([C], 0.0, tl.float32)
    step = tl.where(r < count, tl.maximum(step, -120.0), 0.0)
    sum = tl.cumsum(step.to(tl.float64), 0)
    if DECAY:
        tl.store(sums + (row + r) * heads + head, sum, mask=r < count)
    return sum


@triton.jit
def _diagonal_blocks(n, beta, C: tl.constexpr):
    """Z of the 16 x 16 diagonal blocks by forward substitution, all blocks at once; [C, C]."""
    G: tl.constexpr = C // 16
    g = tl.arange(0, G)
    i = tl.arange(0, 16)
    own = g[:, None, None, None] == g[None, None, :, None]
    z = tl.sum(tl.where(own, tl.reshape(n, [G, 16, G, 16]), 0.0), 2)  # [G, 16, 16]
    lower = z * tl.reshape(beta, [G, 16])[:, None, :]
    for j in range(15):
        column = tl.sum(tl.where(i[None, None, :] == j, lower, 0.0), 2)
        final = tl.sum(tl.where(i[None, :, None] == j, z, 0.0), 1)
        z -= column[:, :, None] * final[:, None, :]
    return tl.reshape(tl.where(own, z[:, :, None, :], 0.0), [C, C])


@triton.jit
def _merge_blocks(z, n, beta, SIZE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Z of diagonal blocks of 2 SIZE from that of SIZE: Z + (I - Z diag(beta)) B (I - diag(beta) Z), where B is n in
    the lower left quarters of the larger blocks."""
    r = tl.arange(0, C)
    block = r // SIZE
    quarter = (block[:, None] == block[None, :] + 1) & (block % 2 == 1)[:, None]
    eye = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    left = eye - z * beta[None, :]
    right = eye - z * beta[:, None]
    middle = tl.dot(left, tl.where(quarter, n, 0.0), input_precision=PRECISION)
    return z + tl.dot(middle, right, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES[:-1])
def prepare(
    q, k, beta, decay, z, sums, q_norms, k_norms,
    starts, counts, length, chunks, H, HV,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Z, running sums of the log decays and norms; one program per chunk and value head."""
    chunk = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    key_head = head // (HV // H)
    row, count = chunk_rows(chunk, length, chunks, starts, counts, C, PACKED)
    keys = load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK)
    strength = load_gate(beta, row, count, HV, head, C)
    sum = _store_sums(decay, sums, row, count, HV, head, C, DECAY)
    n = tl.dot(keys.to(DT), tl.trans(keys.to(DT)), input_precision=PRECISION)
    if NORM:
        queries = load_rows(q + key_head * K, row, count, H * K, 0, K, C, BK)
        _store_norm(queries, q_norms, row, count, HV, head, C)
        factor = _store_norm(keys, k_norms, row, count, HV, head, C)
        n = n * factor[:, None] * factor[None, :]
    r = tl.arange(0, C)
    n = tl.where(r[:, None] > r[None, :], n * decay_between(sum, count, C, DECAY, False), 0.0)
    result = _diagonal_blocks(n, strength, C)
    if C > 16:
        result = _merge_blocks(result, n, strength, 16, C, PRECISION)
    if C > 32:
        result = _merge_blocks(result, n, strength, 32, C, PRECISION)
    store_rows(z + head * C, result, row, count, HV * C, 0, C, C, C)


@triton.jit(do_not_specialize=SIZES)
def scan(
    k, v, beta, z, sums, k_norms, y, entering, initial, final,
    cu_seqlens, first_chunk, length, chunks, H, HV, tiles,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """The state from chunk to chunk, in registers; one program per sequence, value head and tile of V."""
    pid = tl.program_id(0)
    column = (pid % tiles) * BV
    n = pid // tiles // HV
    head = pid // tiles % HV
    key_head = head // (HV // H)
    begin, size, chunk = sequence_rows(n, length, chunks, cu_seqlens, first_chunk, PACKED)
    number = n.to(tl.int64) * HV + head
    if INITIAL:
        state = load_state(initial, number, 1, column, K, V, BK, BV)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    for i in range(0, tl.cdiv(size, C)):
        row = begin + i * C
        count = tl.minimum(size - i * C, C)
        low = state.to(DT)
        store_state(entering, low, (chunk + i) * HV + head, column, K, V, BK, BV)
        keys = load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
        values = load_rows(v + head * V, row, count, HV * V, column, V, C, BV).to(tl.float32)
        inverse = load_rows(z + head * C, row, count, HV * C, 0, C, C, C).to(DT)
        strength = load_gate(beta, row, count, HV, head, C)
        norm = load_norm(k_norms, row, count, HV, head, C, NORM)
        sum, last = load_sums(sums, row, count, HV, head, C, DECAY)
        from_start = norm * tl.exp(sum.to(tl.float32))
        to_end = norm * strength * tl.exp((last - sum).to(tl.float32))
        x = values - from_start[:, None] * tl.dot(keys, low, input_precision=PRECISION)
        error = x - tl.dot(inverse, (strength[:, None] * x).to(DT), input_precision=PRECISION)
        store_rows(y + head * V, error, row, count, HV * V, column, V, C, BV)
        write = tl.dot(tl.trans(keys), (to_end[:, None] * error).to(DT), input_precision=PRECISION)
        state = state * tl.exp(last.to(tl.float32)) + write
    store_state(final, state, number, column, K, V, BK, BV)


@triton.jit(do_not_specialize=SIZES)
def output(
    q, k, beta, sums, q_norms, k_norms, y, entering, o,
    starts, counts, length, chunks, H, HV, tiles, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """o = scale (exp(b) q S_0 + (q k^T exp(b_i - b_j)) beta y); one program per chunk, value head and tile of V."""
    pid = tl.program_id(0)
    column = (pid % tiles) * BV
    chunk = pid // tiles // HV
    head = pid // tiles % HV
    key_head = head // (HV // H)
    row, count = chunk_rows(chunk, length, chunks, starts, counts, C, PACKED)
    queries = load_rows(q + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
    keys = load_rows(k + key_head * K, row, count, H * K, 0, K, C, BK).to(DT)
    state = load_state(entering, chunk.to(tl.int64) * HV + head, count, column, K, V, BK, BV).to(DT)
    errors = load_rows(y + head * V, row, count, HV * V, column, V, C, BV).to(DT)
    strength = load_gate(beta, row, count, HV, head, C)
    q_norm = load_norm(q_norms, row, count, HV, head, C, NORM) * scale
    k_norm = load_norm(k_norms, row, count, HV, head, C, NORM) * strength
    sum, _ = load_sums(sums, row, count, HV, head, C, DECAY)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * q_norm[:, None] * k_norm[None, :]
    scores = scores * decay_between(sum, count, C, DECAY, False)
    result = (q_norm * tl.exp(sum.to(tl.float32)))[:, None] * tl.dot(queries, state, input_precision=PRECISION)
    result += tl.dot(scores.to(DT), errors, input_precision=PRECISION)
    store_rows(o + head * V, result, row, count, HV * V, column, V, C, BV)
