# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the short convolution; programs take tiles of rows, wherever sequences begin and end.

Position p of a sequence is its token p, or before it the input W + p of its initial state. Offsets inside a tile are
32-bit, as registers are few.

Shapes: x, y, dy and dpre (by the sums before the activation) [rows, D]; w [D, W]; state [N, D, W]; partial [tiles of
rows, W + 1, D], by the weights and then by the bias; owner [rows], a row's sequence.
"""

import triton
import triton.language as tl


@triton.jit
def _input(x, state, p, n, size, c, offset, mask, shift, D: tl.constexpr, W: tl.constexpr, INITIAL: tl.constexpr):
    """What lies `shift` rows further, in the same sequence or before it."""
    p += shift
    found = tl.load(x + (offset + shift * D), mask=mask & (p >= 0) & (p < size), other=0.0).to(tl.float32)
    if INITIAL:
        found += tl.load(state + (n * D + c[None, :]) * W + W + p, mask=mask & (p < 0), other=0.0).to(tl.float32)
    return found


@triton.jit(do_not_specialize=["length", "rows", "tiles"])
def convolve(
    x, w, bias, state, y, dy, partial, owner, cu_seqlens, length, rows, tiles,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr, PACKED: tl.constexpr,
    BIAS: tl.constexpr, INITIAL: tl.constexpr, SILU: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """STEP -1 reads earlier tokens, 1 later ones: dx from dpre. WEIGHTS: dpre, as y, and partial from dy."""
    tile = (tl.program_id(0) // tiles).to(tl.int64)
    i, c = tl.arange(0, BT), (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    r, inside = tile * BT + i, c < D
    n = r // length
    begin, size = n * length, n * 0 + length
    if PACKED:
        n = tl.load(owner + r, mask=r < rows, other=0).to(tl.int64)
        begin = tl.load(cu_seqlens + n, mask=r < rows, other=0).to(tl.int64)
        size = tl.load(cu_seqlens + n + 1, mask=r < rows, other=0).to(tl.int64) - begin
    p, size, n = (r - begin).to(tl.int32)[:, None], size.to(tl.int32)[:, None], n[:, None]
    mask, offset = (r < rows)[:, None] & inside[None, :], i[:, None] * D + c[None, :]
    x += tile * BT * D
    total = tl.where(mask, 0.0, 0.0)
    if BIAS:
        total += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    for j in range(W):
        found = _input(x, state, p, n, size, c, offset, mask, STEP * (W - 1 - j), D, W, INITIAL)
        total += found * tl.load(w + c * W + j, mask=inside, other=0.0).to(tl.float32)[None, :]
    gate = tl.sigmoid(total) if SILU else 1.0
    if WEIGHTS:
        grad = tl.load(dy + tile * BT * D + offset, mask=mask, other=0.0).to(tl.float32)
        grad *= gate * (1.0 + total * (1.0 - gate)) if SILU else 1.0
        partial += tile * ((W + 1) * D) + c
        for j in range(W):
            found = _input(x, state, p, n, size, c, offset, mask, STEP * (W - 1 - j), D, W, INITIAL)
            tl.store(partial + j * D, tl.sum(grad * found, 0), mask=inside)
        tl.store(partial + W * D, tl.sum(grad, 0), mask=inside)
        total, gate = grad, 1.0
    if SILU or not WEIGHTS:
        tl.store(y + tile * BT * D + offset, (total * gate).to(y.dtype.element_ty), mask=mask)
