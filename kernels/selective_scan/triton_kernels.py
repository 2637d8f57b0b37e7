# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of diagonal state spaces. The states [BT, NS, BD] of a few tokens exist at a time, in registers.

With E_t = S_{t-1}, keep = exp(dt A) or 1 - dt B B, and write = dt x B, the gradient of S_t is
    G_t = C_t dy_t + keep_{t+1} G_{t+1},    dkeep_t = G_t E_t,    dwrite_t = G_t.
E is scanned again, from the states that the forward pass kept: one for each tile of tokens.

Shapes: D channels of n states, N sequences, BT, BD and NS tiles of rows, D and n; x, dt, y [rows, D]; b, c
[rows, G, n], or [D, n] (no groups); a [D, n]; begin, end [N, D, n]; kept [tiles of tokens, n, D]; db, dc of groups
[tiles of D, rows, n]; own_sums by a, b, c without groups [programs on the same channels, 3, n, D]; dd [programs, D];
sums [programs, 2, n, D]. i numbers the states of a channel.
"""

import triton
import triton.language as tl

from zoo.kernels.tiles import SEGMENTS, affine, place_segment, row_of


@triton.jit
def _tokens(x, row, p, c, low, high, D: tl.constexpr):
    """[BT, 1, BD], zero outside of low <= p < high."""
    mask = ((p >= low) & (p < high))[:, None, None] & (c < D)[None, None, :]
    return tl.load(x + (row + p)[:, None, None] * D + c[None, None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _projection(x, row, p, i, c, low, high, D: tl.constexpr, G: tl.constexpr, n: tl.constexpr):
    """B or C: [BT, NS, 1], or the parameter [1, NS, BD]."""
    if G:
        place = ((row + p)[:, None, None] * G + tl.min(c, 0) // (D // G)) * n + i[None, :, None]
        mask = ((p >= low) & (p < high))[:, None, None] & (i < n)[None, :, None]
    else:
        place, mask = c[None, None, :] * n + i[None, :, None], (i < n)[None, :, None] & (c < D)[None, None, :]
    return tl.load(x + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _step(
    x, dt, b, rate, row, p, i, c, low, high, D: tl.constexpr, G: tl.constexpr, n: tl.constexpr, RATE: tl.constexpr
):
    """x, dt, B, and what tokens keep of the state: all of it where there is no token."""
    steps, key = _tokens(dt, row, p, c, low, high, D), _projection(b, row, p, i, c, low, high, D, G, n)
    keep = tl.exp(steps * rate) if RATE else 1.0 - steps * key * key
    return _tokens(x, row, p, c, low, high, D), steps, key, keep


@triton.jit
def _enter(a, begin, sums, cu_seqlens, first_chunk, length, chunks, segment, segments, tiles, D: tl.constexpr,
           n: tl.constexpr, BD: tl.constexpr, NS: tl.constexpr, RATE: tl.constexpr, PACKED: tl.constexpr,
           GIVEN: tl.constexpr, SUMMARY: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    """Where the program is, A or zeros, and the state that its segment begins with (REVERSE: ends)."""
    c, seq, row, size, chunk, s, first, last, owner = place_segment(
        cu_seqlens, first_chunk, length, chunks, segment, segments, tiles, BD, PACKED)  # fmt: skip
    i = tl.arange(0, NS)
    mask, place, own = (i < n)[:, None] & (c < D)[None, :], i[:, None] * D + c[None, :], c[None, :] * n + i[:, None]
    rate = tl.load(a + own, mask=mask, other=0.0) if RATE else tl.where(mask, 0.0, 0.0)
    carry = tl.load(begin + seq * (n * D) + own, mask=mask, other=0.0) if GIVEN and not SUMMARY else rate * 0.0
    for j in range(0, 0 if SUMMARY else segments - 1 - s if REVERSE else s):
        done = sums + (seq * segments + (segments - 1 - j if REVERSE else j)) * (2 * n * D) + place
        carry = tl.load(done, mask=mask) * carry + tl.load(done + n * D, mask=mask)
    return c, seq, row, size, chunk, s, first, last, owner, i, mask, place, own, rate, carry


@triton.jit(do_not_specialize=[*SEGMENTS, "chunks"])
def forward(
    x, dt, a, b, c, d, begin, y, end, kept, sums, cu_seqlens, length, segment, segments, tiles, first_chunk, chunks,
    D: tl.constexpr, n: tl.constexpr, GB: tl.constexpr, GC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    NS: tl.constexpr, RATE: tl.constexpr, SKIP: tl.constexpr, INITIAL: tl.constexpr, PACKED: tl.constexpr,
    SUMMARY: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    ch, seq, row, _, chunk, s, first, last, owner, i, mask, place, own, rate, carry = _enter(
        a, begin, sums, cu_seqlens, first_chunk, length, chunks, segment, segments, tiles, D, n, BD, NS, RATE, PACKED,
        INITIAL, SUMMARY, False)  # fmt: skip
    r, span, product = tl.arange(0, BT), n * D, rate * 0.0 + 1.0
    skip = tl.load(d + ch, mask=ch < D, other=0.0) if SKIP else tl.zeros([BD], tl.float32)
    for start in range(first, last, BT):
        p = start + r
        if SAVE and not SUMMARY:
            tl.store(kept + (chunk + start // BT) * span + place, carry, mask=mask)
        xs, steps, key, keep = _step(x, dt, b, rate, row, p, i, ch, 0, last, D, GB, n, RATE)
        products, states = tl.associative_scan((keep, steps * xs * key), 0, affine)
        states += products * carry[None, :, :]
        carry = row_of(states, r[:, None, None], BT - 1)
        if SUMMARY:
            product *= row_of(products, r[:, None, None], BT - 1)
        else:
            out = tl.sum(states * _projection(c, row, p, i, ch, 0, last, D, GC, n), 1) + tl.sum(xs, 1) * skip[None, :]
            spot = (row + p)[:, None] * D + ch[None, :]
            tl.store(y + spot, out.to(y.dtype.element_ty), mask=(p < last)[:, None] & (ch < D)[None, :])
    if SUMMARY:
        sums += (seq * segments + s) * 2 * span + place
        tl.store(sums, product, mask=mask)
        tl.store(sums + span, carry, mask=mask)
    else:
        tl.store(end + seq * span + own, carry, mask=mask & owner[None, :])


@triton.jit(do_not_specialize=[*SEGMENTS, "chunks", "rows"])
def backward(
    x, dt, a, b, c, d, kept, dy, dend, dx, ddt, db, dc, own_sums, dd, dbegin,
    sums, cu_seqlens, length, segment, segments, tiles, first_chunk, chunks, rows,
    D: tl.constexpr, n: tl.constexpr, GB: tl.constexpr, GC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    NS: tl.constexpr, RATE: tl.constexpr, SKIP: tl.constexpr, INITIAL: tl.constexpr, PACKED: tl.constexpr,
    SUMMARY: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    ch, seq, row, size, chunk, s, first, last, _, i, mask, place, own, rate, carry = _enter(
        a, dend, sums, cu_seqlens, first_chunk, length, chunks, segment, segments, tiles, D, n, BD, NS, RATE, PACKED,
        FINAL, SUMMARY, True)  # fmt: skip
    r, span, product = tl.arange(0, BT), n * D, rate * 0.0 + 1.0
    sum_a, sum_b, sum_c, sum_d = rate * 0.0, rate * 0.0, rate * 0.0, tl.zeros([BD], tl.float32)
    skip = tl.load(d + ch, mask=ch < D, other=0.0) if SKIP else sum_d
    until = tl.minimum(last + 1, size)  # a segment needs the token after it; after a sequence nothing decays
    count = tl.cdiv(tl.maximum(last - first, 0), BT)
    for step in range(0, count):
        start = first + (count - 1 - step) * BT
        p = start + r
        grad = _tokens(dy, row, p, ch, 0, last, D)
        by_state = grad * _projection(c, row, p, i, ch, 0, last, D, GC, n)
        keep = _step(x, dt, b, rate, row, p + 1, i, ch, 0, until, D, GB, n, RATE)[3]
        keep = tl.where((p < last)[:, None, None], keep, 1.0)
        products, by_state = tl.associative_scan((keep, by_state), 0, affine, reverse=True)
        by_state += products * carry[None, :, :]
        carry = row_of(by_state, r[:, None, None], 0)
        if SUMMARY:
            product *= row_of(products, r[:, None, None], 0)
        else:
            xs, steps, key, keep = _step(x, dt, b, rate, row, p - 1, i, ch, start, last, D, GB, n, RATE)
            products, before = tl.associative_scan((keep, steps * xs * key), 0, affine)
            before += products * tl.load(kept + (chunk + start // BT) * span + place, mask=mask, other=0.0)[None, :, :]
            xs, steps, key, keep = _step(x, dt, b, rate, row, p, i, ch, 0, last, D, GB, n, RATE)
            by_out = grad * (keep * before + steps * xs * key)
            by_key, by_keep = by_state * steps * xs, by_state * before
            if RATE:
                by_dt = tl.sum(by_keep * keep * rate[None, :, :], 1)
                sum_a += tl.sum(by_keep * keep * steps, 0)
            else:
                by_key -= 2.0 * steps * key * by_keep
                by_dt = -tl.sum(by_keep * key * key, 1)
            by_x, x_flat, dt_flat, dy_flat = tl.sum(by_state * key, 1), tl.sum(xs, 1), tl.sum(steps, 1), tl.sum(grad, 1)
            spot, inside = (row + p)[:, None] * D + ch[None, :], (p < last)[:, None] & (ch < D)[None, :]
            tl.store(dx + spot, (dt_flat * by_x + dy_flat * skip[None, :]).to(dx.dtype.element_ty), mask=inside)
            tl.store(ddt + spot, x_flat * by_x + by_dt, mask=inside)
            sum_d += tl.sum(dy_flat * x_flat, 0)
            spot = ((tl.program_id(0) % tiles).to(tl.int64) * rows + row + p)[:, None] * n + i[None, :]
            inside = (p < last)[:, None] & (i < n)[None, :]
            if GB:
                tl.store(db + spot, tl.sum(by_key, 2), mask=inside)
            else:
                sum_b += tl.sum(by_key, 0)
            if GC:
                tl.store(dc + spot, tl.sum(by_out, 2), mask=inside)
            else:
                sum_c += tl.sum(by_out, 0)
    part = seq * segments + s
    if SUMMARY:
        tl.store(sums + part * 2 * span + place, product, mask=mask)
        tl.store(sums + (part * 2 + 1) * span + place, carry, mask=mask)
    else:
        tl.store(own_sums + part * 3 * span + place, sum_a, mask=mask)
        tl.store(own_sums + (part * 3 + 1) * span + place, sum_b, mask=mask)
        tl.store(own_sums + (part * 3 + 2) * span + place, sum_c, mask=mask)
        tl.store(dd + part * D + ch, sum_d, mask=ch < D)
        if INITIAL:
            keep = _step(x, dt, b, rate, row, tl.arange(0, 1), i, ch, 0, size, D, GB, n, RATE)[3]
            tl.store(dbegin + seq * span + own, tl.sum(keep, 0) * carry, mask=mask & (ch * 0 + s == 0)[None, :])
