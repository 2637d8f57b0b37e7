# mypy: disable-error-code="no-untyped-def"
"""One token of the recurrences with a matrix for a state: every program reads its tile of the state once and writes it
once.

    LOW_RANK:  S = Diag(exp decay) S + b^T (a S) + k^T v
    DELTA:     S' = Diag(exp decay) S,  S = S' + k^T beta (v - k S')
    else:      S = Diag(exp decay) S + k^T v;        o = scale q S

Shapes: H key heads, HV value heads, K and V head widths, BK and BV tiles of them; DECAY is the number of axes of decay.
"""

# The annotations of a kernel are read when it is defined: no `from __future__ import annotations` here.
import triton
import triton.language as tl


@triton.jit
def row(x, n, stride, start, r, D):
    """[D] of sequence n, from `start` on."""
    return tl.load(x + n * stride + start + r, mask=r < D, other=0.0).to(tl.float32)


@triton.jit
def step_kernel(
    q, k, v, a, b, beta, decay, state, o, scale, q_row, k_row, v_row, a_row, b_row, state_row,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, LOW_RANK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (V + BV - 1) // BV
    place = tl.program_id(0)
    column, n = (place % tiles) * BV, (place // tiles // HV).to(tl.int64)
    head = place // tiles % HV
    r, c = tl.arange(0, BK), column + tl.arange(0, BV)
    seen = (r < K)[:, None] & (c < V)[None, :]
    tile = state + n * state_row + head * (K * V) + r[:, None] * V + c[None, :]
    s = tl.load(tile, mask=seen, other=0.0)
    start = head // (HV // H) * K
    query, key = row(q, n, q_row, start, r, K), row(k, n, k_row, start, r, K)
    value = row(v, n, v_row, head * V + column, tl.arange(0, BV), V - column)
    if NORM:
        query *= tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
        key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
    query *= scale
    if LOW_RANK:
        read = tl.sum(row(a, n, a_row, start, r, K)[:, None] * s, 0)
    if DECAY == 1:
        s *= tl.exp(tl.load(decay + head))
    if DECAY == 2:
        s *= tl.exp(row(decay, n, 0, head * K, r, K))[:, None]
    if DECAY == 3:
        s *= tl.exp(tl.load(decay + n * HV + head))
    if DECAY == 4:
        s *= tl.exp(row(decay, n, HV * K, head * K, r, K))[:, None]
    if DELTA:
        value = tl.load(beta + n * HV + head) * (value - tl.sum(key[:, None] * s, 0))
    if LOW_RANK:
        s += row(b, n, b_row, start, r, K)[:, None] * read[None, :]
    s += key[:, None] * value[None, :]
    tl.store(tile, s, mask=seen)
    result = tl.sum(query[:, None] * s, 0)
    tl.store(o + (n * HV + head) * V + c, result.to(o.dtype.element_ty), mask=c < V)
