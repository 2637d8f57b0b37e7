# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of the elementwise recurrence, for both directions.

Backward (REVERSE) it runs from the last token to the first, on g_t = dh_t + exp(decay_{t+1}) g_{t+1}, which is dx_t,
and on to the initial state; ddecay_t = g_t exp(decay_t) h_{t-1}. With MAX it is h_t = max(h_{t-1} + decay_t, x_t).

Shapes: D channels, N sequences, BT and BD tiles of rows and D; x, decay, y, h, ddecay [rows, D]; begin, end, initial
[N, D]; sums [programs, 2, D].
"""

import triton
import triton.language as tl

from zoo.kernels.tiles import SEGMENTS, affine, place_segment, row_of


@triton.jit
def _highest(keep1, add1, keep2, add2):
    return keep1 + keep2, tl.maximum(add1 + keep2, add2)


@triton.jit
def _after(keep, state, add, MAX: tl.constexpr):
    return tl.maximum(state + keep, add) if MAX else keep * state + add


@triton.jit(do_not_specialize=SEGMENTS)
def scan(
    x, decay, y, begin, end, h, initial, ddecay, sums, cu_seqlens, length, segment, segments, tiles,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, MAX: tl.constexpr,
    PACKED: tl.constexpr, SUMMARY: tl.constexpr, REVERSE: tl.constexpr, BEGIN: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    c, n, row, size, _, s, first, last, owner = place_segment(
        cu_seqlens, cu_seqlens, length, 0, segment, segments, tiles, BD, PACKED)  # fmt: skip
    inside, r, empty = c < D, tl.arange(0, BT), -1e38 if MAX else 0.0
    carry, product = tl.zeros([BD], tl.float32) + empty, tl.zeros([BD], tl.float32) + (0.0 if MAX else 1.0)
    sums += n * segments * (2 * D) + c
    if BEGIN and not SUMMARY:
        carry = tl.load(begin + n * D + c, mask=inside, other=0.0)
    for j in range(0, 0 if SUMMARY else s):
        keep, add = tl.load(sums + j * 2 * D, mask=inside), tl.load(sums + (j * 2 + 1) * D, mask=inside)
        carry = _after(keep, carry, add, MAX)
    for start in tl.range(first, last, BT, num_stages=STAGES):
        p = start + r
        token = size - 1 - p if REVERSE else p
        place = (row + token)[:, None] * D + c[None, :]
        mask = (p < last)[:, None] & inside[None, :]
        value = tl.load(x + place, mask=mask, other=empty).to(tl.float32)
        keep = tl.load(decay + place + REVERSE * D, mask=mask & (p >= REVERSE)[:, None], other=0.0)
        if MAX:
            products, values = tl.associative_scan((keep, value), 0, _highest)
        else:
            products, values = tl.associative_scan((tl.exp(keep), value), 0, affine)
        values = _after(products, carry[None, :], values, MAX)
        carry = row_of(values, r[:, None], BT - 1)
        if SUMMARY:
            passed = row_of(products, r[:, None], BT - 1)
            product = product + passed if MAX else product * passed
        else:
            tl.store(y + place, values.to(y.dtype.element_ty), mask=mask)
            if REVERSE:
                before = tl.load(h + place - D, mask=mask & (token > 0)[:, None], other=0.0).to(tl.float32)
                if INITIAL:
                    before += tl.load(initial + n * D + c + place * 0, mask=mask & (token == 0)[:, None], other=0.0)
                own = tl.exp(tl.load(decay + place, mask=mask, other=0.0))
                tl.store(ddecay + place, values * own * before, mask=mask)
    if SUMMARY:
        tl.store(sums + s * 2 * D, product, mask=inside)
        tl.store(sums + (s * 2 + 1) * D, carry, mask=inside)
    elif INITIAL or not REVERSE:
        carry *= tl.exp(tl.load(decay + row * D + c, mask=inside & (c * 0 < size * REVERSE), other=0.0))
        tl.store(end + n * D + c, carry, mask=inside & owner)
