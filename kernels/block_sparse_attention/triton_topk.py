# mypy: disable-error-code="no-untyped-def"
"""A Triton kernel that chooses blocks: the best of a row by bisection for the least number that is chosen, no sort.

Numbers are compared as integers of the same order. Each step of a bisection counts, or by mass sums in fp64, what is at
or above the middle; of equal numbers the first ones are chosen.

Shapes: B batch, HS heads of the lists, G heads whose softmaxes are added; query blocks `first` on, `count` of them;
a row of `width` numbers, in a tile of BLOCK; lists of up to `entries` blocks.
"""

# The annotations of a kernel are read when it is defined: no `from __future__ import annotations` here.
import triton
import triton.language as tl

from zoo.kernels.block_sparse_attention.triton_place import place

SIZES = ["step", "Tq", "Tk", "blocks", "M", "block", "first", "count", "width", "entries", "fixed", "least", "most"]
SIZES += ["local", "sink"]
LOG2E = tl.constexpr(1.4426950408889634)
LOW, HIGH = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit
def ordered(x):
    """fp32 as int32 of the same order."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & HIGH)


@triton.jit
def middle(low, high):
    """Rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def visible(c, p0, size, length, block, local, sink, CAUSAL: tl.constexpr, OWN: tl.constexpr):
    """Of blocks c: whether they may be listed, must be, and are scored (own ones, if causal, only with OWN)."""
    begin, end = p0 // block, (p0 + size - 1) // block
    there = c * block < tl.where(size > 0, length, 0)
    if CAUSAL:
        there = there & (c <= end)
    kept = (c > tl.where(local > 0, begin - local, HIGH)) & (c < end + (1 if CAUSAL else local))
    kept = there & (kept | (c < sink))
    scored = there
    if CAUSAL:
        there = there & ((c < begin) | kept)
        scored = there
        if not OWN:
            scored = there & (c < begin)
    return there, kept, scored


@triton.jit
def row_weights(
    scores, c, scored, count, width, G: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK: tl.constexpr, GB: tl.constexpr
):  # fmt: skip
    """[BLOCK], 0 where not scored; with SOFTMAX over a row, the sum over the G heads, GB at a time."""
    if SOFTMAX:
        weight = tl.zeros([BLOCK], tl.float32)
        for at in range(0, G, GB):
            g = at + tl.arange(0, GB)
            seen = (g < G)[:, None] & scored[None, :]
            # Heads lie `count` rows apart.
            place_of = scores + (g.to(tl.int64) * count * width)[:, None] + c[None, :]
            tile = tl.load(place_of, mask=seen, other=-float("inf"))
            top = tl.max(tile, 1)
            tile = tl.exp2((tile - tl.where(top == -float("inf"), 0.0, top)[:, None]) * LOG2E)
            total = tl.sum(tile, 1)
            weight += tl.sum(tile * tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)[:, None], 0)
    else:
        weight = tl.load(scores + c, mask=scored, other=0.0)
    return weight


@triton.jit
def count_by_mass(weight, key, rest, kept, share):
    """How many blocks, kept ones first and then best first, hold the share of all weight."""
    total, have = tl.sum(weight.to(tl.float64), 0), tl.sum(tl.where(kept, weight, 0.0).to(tl.float64), 0)
    wide, target = tl.where(rest, weight, 0.0).to(tl.float64), total * share
    low, high = tl.min(tl.where(rest, key, HIGH), 0), tl.max(tl.where(rest, key, LOW), 0)
    while low < high:
        at = middle(low, high)
        enough = have + tl.sum(tl.where(key >= at, wide, 0.0), 0) >= target
        low, high = tl.where(enough, at, low), tl.where(enough, high, at - 1)
    above, equal = rest & (key > low), rest & (key == low)
    lacking = target - have - tl.sum(tl.where(above, wide, 0.0), 0)
    each = tl.max(tl.where(equal, weight, 0.0), 0).to(tl.float64)
    many = tl.sum(equal.to(tl.int32), 0)
    # Compared before it becomes an integer: it may be far too large for one.
    more = tl.minimum(tl.ceil(lacking / tl.where(each > 0.0, each, 1.0)), many.to(tl.float64)).to(tl.int32)
    count = tl.sum(kept.to(tl.int32), 0) + tl.sum(above.to(tl.int32), 0) + tl.maximum(more, tl.minimum(many, 1))
    return tl.where(have >= target, 1, count)


@triton.jit
def best(key, rest, need):
    """The `need` of `rest` with the largest keys."""
    low, high = tl.min(tl.where(rest, key, HIGH), 0), tl.max(tl.where(rest, key, LOW), 0)
    free = tl.sum(rest.to(tl.int32), 0)
    high = tl.where(need >= free, low, high)
    low, high = tl.where(need <= 0, HIGH, low), tl.where(need <= 0, HIGH, high)
    while low < high:
        at = middle(low, high)
        found = tl.sum((key >= at).to(tl.int32), 0)
        high = tl.where(found >= need, tl.where(found == need, at, high), at - 1)
        low = tl.where(found >= need, at, low)
    above, equal = rest & (key > low), rest & (key == low)
    left = need - tl.sum(above.to(tl.int32), 0)
    if tl.sum(equal.to(tl.int32), 0) > left:
        equal = equal & (tl.cumsum(equal.to(tl.int32), 0) <= left)
    return above | equal


@triton.jit(do_not_specialize=SIZES)
def choose(
    scores, lists, counts, numbers, positions, starts, table, step, Tq, Tk, blocks, M, block, first, count, width,
    entries, fixed, least, most, local, sink, mass, mass_rest,
    HS: tl.constexpr, G: tl.constexpr, CAUSAL: tl.constexpr, OWN: tl.constexpr, SOFTMAX: tl.constexpr,
    MASS: tl.constexpr, SHIFTED: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr, GB: tl.constexpr,
):  # fmt: skip
    """lists [B, HS, blocks, entries] in ascending order, -1 beyond counts [B, HS, blocks], from scores [B, HS, G,
    count, width]; SHIFTED rows begin at the first block of all sequences. How many: by MASS, the sum of two fp32
    numbers; or `numbers` says it of each number of visible blocks, or it is `fixed`. A program for each list."""
    r, rest = first + tl.program_id(0) % count, tl.program_id(0) // count
    b = rest // HS
    layout = (positions, step, starts, table, Tq, Tk, blocks, M)
    _, size, p0, length, start = place(r, b, layout, PACKED)
    c = tl.arange(0, BLOCK)
    there, kept, scored = visible(c, p0, size, length, block, local, sink, CAUSAL, OWN)
    scores += (rest.to(tl.int64) * (G * count) + r - first) * width + (start if SHIFTED else 0)
    weight = row_weights(scores, c, scored, count, width, G, SOFTMAX, BLOCK, GB)
    others = there & (kept == 0)
    key = tl.where(others, ordered(weight), LOW)
    seen, forced = tl.sum(there.to(tl.int32), 0), tl.sum(kept.to(tl.int32), 0)
    if MASS:
        share = tl.full([], 0.0, tl.float64) + mass + mass_rest
        wanted = count_by_mass(weight, key, others, kept, share)
        wanted = tl.minimum(tl.maximum(wanted, least), most)
    elif numbers is not None:
        wanted = tl.load(numbers + seen)
    else:
        wanted = seen * 0 + fixed
    wanted = tl.minimum(tl.maximum(wanted, forced), seen)
    chosen = kept | best(key, others, wanted - forced)
    at = tl.cumsum(chosen.to(tl.int32), 0) - 1
    row = rest.to(tl.int64) * blocks + r
    tl.store(lists + row * entries + at, c, mask=chosen & (at < entries))
    tl.store(lists + row * entries + c, -1, mask=(c >= wanted) & (c < entries))
    tl.store(counts + row, wanted)
