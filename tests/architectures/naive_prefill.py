"""Published rules of methods that choose keys in prefill, one mask `[H, T, T]` per head, key by key.

T tokens, H query heads over half as many KV heads, B tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.sparse import View

T, B = 150, 16
PATTERNS = (("a_shape", 0.2), ("vertical_slash", 0.5), ("block", 0.0), ("vertical_slash", 0.25))


def scores_of(x: View) -> Tensor:
    """Causal scores `[H, T, T]`."""
    k = x.k[0].repeat_interleave(x.q.shape[2] // x.k.shape[2], 1)
    scores = torch.einsum("ihk,jhk->hij", x.q[0], k) * x.q.shape[3] ** -0.5
    return scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)


def attend(x: View, seen: Tensor) -> Tensor:
    """`[1, T, H, V]` by masks `[H, T, T]`."""
    weights = scores_of(x).masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhv->ihv", weights, x.v[0].repeat_interleave(2, 1))[None]


def rows(size: int, tokens: int = T) -> Iterator[tuple[int, range]]:
    return ((begin // size, range(begin, min(begin + size, tokens))) for begin in range(0, tokens, size))


def show(seen: Tensor, head: int, row: range, blocks: Any, block: int = B) -> None:
    for i in row:
        for c in blocks:
            seen[head, i, c * block : min((c + 1) * block, i + 1)] = True


def held(order: list[Any], mass: dict[Any, float], share: float) -> list[Any]:
    """The first of `order` that hold that share of all mass."""
    found: list[Any] = []
    while sum(mass[x] for x in found) < share * sum(mass.values()) * (1 - 1e-9):
        found.append(order[len(found)])
    return found


def stripes(weights: Tensor, last: int) -> tuple[dict[int, float], dict[int, float]]:
    """What the last queries give to each key and to each distance, by weights `[T, T]` of a head."""
    n, rows = len(weights), weights.tolist()
    queries = range(max(0, n - last), n)
    vertical = {j: sum(rows[i][j] for i in queries) for j in range(n)}
    slash = {d: sum(rows[i][i - d] for i in queries if i >= d) for d in range(n)}
    return vertical, slash


def largest(mass: dict[Any, float], near: int = 0) -> list[Any]:
    return sorted(mass, key=lambda x: (x not in range(near), -mass[x] if x not in range(near) else x))


def crossed(row: range, slashes: list[int], most: int) -> list[int]:
    """Blocks of a row that these diagonals cross, the own one first; the last row is as high as all."""
    found = [row[0] // B]
    for d in slashes:
        found += sorted({(i - d) // B for i in range(row[0], row[0] + B) if i >= d} - set(found))
    return found[:most]


def pooled(x: View, head: int, size: int = B) -> list[list[float]]:
    """Products of mean queries and mean keys, by row and block."""
    q = torch.stack([x.q[0, row, head].mean(0) for _, row in rows(size, x.q.shape[1])])
    k = torch.stack([x.k[0, row, head // 2].mean(0) for _, row in rows(B, x.q.shape[1])])
    products: list[list[float]] = (q @ k.T * x.q.shape[3] ** -0.5).tolist()
    return products


def pairs(x: View, head: int, share: float) -> set[tuple[int, int]]:
    """The fewest pairs of blocks that hold a share of all softmaxes over blocks."""
    mass = {}
    for r, row in enumerate(pooled(x, head)):
        weights = torch.tensor(row[: r + 1], dtype=torch.float64).softmax(0)
        mass |= {(r, c): float(weight) for c, weight in enumerate(weights)}
    return set(held(largest(mass), mass, share))


def distance(x: View, head: int, weights: Tensor) -> float:
    """The root of the Jensen-Shannon divergence of the estimate for the last queries."""
    last, k = slice(T - B, T), torch.stack([x.k[0, row, head // 2].mean(0) for _, row in rows(B)])
    a = (k @ x.q[0, last, head].mean(0) * x.q.shape[3] ** -0.5).softmax(0).tolist()
    t = [float(weights[last, row].sum()) / B for _, row in rows(B)]
    both = [(p, (p + q) / 2) for p, q in zip(a, t, strict=True)] + [(q, (p + q) / 2) for p, q in zip(a, t, strict=True)]
    return math.sqrt(sum(p * math.log(p / m) for p, m in both) / 2)


def left(n: int, r: int, row: range, keys: list[int]) -> int:
    """Blocks that are left of n for slashes, by the keys that the row sees."""
    return n if n >= r + 1 else max(n - math.ceil(sum(j <= row[-1] for j in keys) / B), 1)


def minference(x: View, count: Any, patterns: Any = PATTERNS, last: int = 64, near: int = 3) -> Tensor:
    weights, seen = scores_of(x).softmax(-1), torch.zeros(4, T, T, dtype=torch.bool)
    for h, (kind, share) in enumerate(patterns):
        vertical, slash = stripes(weights[h], last)
        means = pooled(x, h)
        keys, distances = largest(vertical, near), largest(slash, near)
        if kind == "a_shape":
            keys, distances = list(range(T)), list(range(T))
        some = keys[: int(share * count(10) * B + 1e-9)]
        for r, row in rows(B):
            n = count(r + 1)
            if kind == "block":
                order = largest(dict(enumerate(means[r][:r])))
                show(seen, h, row, [r, *order][:n])
                continue
            show(seen, h, row, crossed(row, distances, left(n, r, row, some)))
        if kind != "block":
            seen[h, :, some] = True
    return seen.tril()


def minference_by_mass(x: View, share: float) -> Tensor:
    weights, seen = scores_of(x).softmax(-1), torch.zeros(4, T, T, dtype=torch.bool)
    for h, (kind, _) in enumerate(PATTERNS):
        vertical, slash = stripes(weights[h], 64)
        orders = [list(range(T))] * 2 if kind == "a_shape" else [largest(vertical, 3), largest(slash, 3)]
        keys, slashes = (held(order, mass, share) for order, mass in zip(orders, (vertical, slash), strict=True))
        chosen = pairs(x, h, share) if kind == "block" else set()
        for r, row in rows(B):
            show(seen, h, row, [r, *(c for a, c in chosen if a == r)])
            if kind != "block":
                show(seen, h, row, crossed(row, slashes, T))
        if kind != "block":
            seen[h, :, keys] = True
    return seen.tril()


def flexprefill(x: View, tau: float, budget: Any) -> tuple[Tensor, list[bool]]:
    """`budget`: gamma and min_budget, or how many blocks a block of queries reads of n."""
    weights, seen, trusted = scores_of(x).softmax(-1), torch.zeros(4, T, T, dtype=torch.bool), []
    for h in range(4):
        vertical, slash = stripes(weights[h], B)
        aware = distance(x, h, weights[h]) < tau
        trusted.append(aware)
        keys, slashes, means = largest(vertical), largest(slash), pooled(x, h)
        if isinstance(budget, tuple):
            gamma, least = budget
            chosen = pairs(x, h, gamma) if aware else set()
            counts = [
                least if aware else max(least, len(held(*o, gamma))) for o in ((keys, vertical), (slashes, slash))
            ]
            for r, row in rows(B):
                show(seen, h, row, [r, *(c for a, c in chosen if a == r), *crossed(row, slashes[: counts[1]], T)])
            seen[h, :, keys[: counts[0]]] = True
            continue
        some = keys[: int(0.25 * budget(10) * B + 1e-9)]
        for r, row in rows(B):
            n = budget(r + 1)
            order = largest(dict(enumerate(means[r][:r])))
            show(seen, h, row, [r, *order][:n] if aware else crossed(row, slashes, left(n, r, row, some)))
        if not aware:
            seen[h, :, some] = True
    return seen.tril(), trusted


def xattention(x: View, stride: int, budget: Any) -> Tensor:
    """`budget`: a threshold for each head, or how many blocks of n."""
    seen = torch.zeros(4, T, T, dtype=torch.bool)
    q, k = (torch.nn.functional.pad(y[0], (0, 0, 0, 0, 0, -T % stride)) for y in (x.q, x.k))
    for h in range(4):
        mass = torch.zeros(10, 10, dtype=torch.float64)
        for a in range(len(q) // stride):
            tile = []
            for c in range(a + 1):
                line = q[a * stride : (a + 1) * stride, h].flip(0) * k[c * stride : (c + 1) * stride, h // 2]
                tile.append(line.sum() / stride * 8**-0.5)
            for c, weight in enumerate(torch.stack(tile).softmax(0)):
                mass[a * stride // B, c * stride // B] += weight
        for r, row in rows(B):
            first = list(dict.fromkeys([0, r]))
            order = first + sorted(set(range(r)) - {0}, key=lambda c: -float(mass[r, c]))
            if isinstance(budget, list):
                wanted = held(order, {c: float(mass[r, c]) for c in order}, budget[h])
                show(seen, h, row, {*first, *wanted})
            else:
                show(seen, h, row, order[: max(budget(r + 1), len(first))])
    return seen


def cosine(tokens: Tensor) -> float:
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    return float((unit @ unit.T).mean())


def spargeattn(x: View, theta: float, budget: Any, smooth: bool = True, size: int = 32) -> tuple[Tensor, list[bool]]:
    """`budget`: tau, or how many blocks of n. Also which blocks of queries and of keys are alike."""
    seen, alike = torch.zeros(4, T, T, dtype=torch.bool), []
    for h in range(4):
        keys = x.k[0, :, h // 2]
        keys = keys - keys.mean(0) if smooth else keys
        like_k = [cosine(keys[row]) > theta for _, row in rows(B)]
        like_q = [cosine(x.q[0, row, h]) > theta for _, row in rows(size)]
        means = pooled(x, h, size)
        alike += like_k + like_q
        for r, row in rows(size):
            own = [c for c in range(10) if row[0] // B <= c <= row[-1] // B]
            before = range(row[-1] // B + 1)
            some = [c for c in before if like_k[c]]
            scores = means[r]
            total = sum(math.exp(scores[c]) for c in some)
            mass = {c: math.exp(scores[c]) / total for c in some}
            order = largest(mass)
            chosen = held(order, mass, budget) if isinstance(budget, float) else order[: budget(len(before))]
            kept = {*own, *chosen, *(c for c in before if not like_k[c])}
            show(seen, h, row, kept if like_q[r] else before)
    return seen, alike
