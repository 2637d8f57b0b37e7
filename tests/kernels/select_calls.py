"""A naive choice of blocks, to compare `select_blocks` with."""

from __future__ import annotations

import math

import torch

STRIDE, SCALE = 4, 0.4


def inputs(tq, tk=None, b=2):
    return {"q": torch.randn(b, tq, 4, 6).double() * 2, "k": torch.randn(b, tk or tq, 2, 6).double()}


def estimate(queries, at, keys, score, causal):
    """One number per key block, by list of queries at positions `at` and key blocks; of antidiagonals weights."""
    if score == "mean":
        pooled = sum(queries) / len(queries)
        return [SCALE * float(pooled @ block.mean(0)) for block in keys]
    if score == "bounds":
        bound = [[float(torch.maximum(q * x.amax(0), q * x.amin(0)).sum()) for q in queries] for x in keys]
        return [SCALE * max(row) for row in bound]
    masses = [0.0] * len(keys)
    for a in range(0, len(queries), STRIDE):
        tile, last = queries[a : a + STRIDE], at[a : a + STRIDE][-1]
        logits = {}
        for c, block in enumerate(keys):
            for d in range(0, len(block), STRIDE):
                begin = sum(len(x) for x in keys[:c]) + d
                if not causal or begin <= last:
                    pairs = [
                        float(tile[STRIDE - 1 - t] @ block[d + t])
                        for t in range(STRIDE)
                        if STRIDE - 1 - t < len(tile) and d + t < len(block)
                    ]
                    logits[c, d] = SCALE / STRIDE * sum(pairs)
        total = sum(math.exp(x) for x in logits.values())
        for (c, _), x in logits.items():
            masses[c] += math.exp(x) / total
    return masses


def choose(q, k, at, budget, *, block, score, heads, causal, local, sink):
    """The lists of one query block whose queries [n, H, K] lie at `at`, over keys [length, Hk, K]."""
    groups, n = q.shape[1] // k.shape[1], -(-len(k) // block)
    first, last = at[0] // block, at[-1] // block
    allowed = [c for c in range(n) if not causal or c <= last]
    own = [c for c in allowed if first <= c <= last]
    forced = {c for c in allowed if c < sink}
    if local:
        forced |= {c for c in allowed if first - local < c and c < last + (1 if causal else local)}
    if causal:
        allowed = [c for c in allowed if c not in own or c in forced]
    scored = [c for c in allowed if score == "antidiagonal" or not (causal and c in own)]
    by_head = []
    for h in range(q.shape[1]):
        keys = [k[c * block : (c + 1) * block, h // groups] for c in range(n)]
        values = estimate(list(q[:, h]), at, keys, score, causal)
        if score != "antidiagonal" and (budget.mass is not None or heads == "kv"):
            total = sum(math.exp(values[c]) for c in scored)
            values = [math.exp(values[c]) / total if c in scored else 0.0 for c in range(n)]
        by_head.append(values)
    lists = []
    for g in range(len(by_head) if heads == "query" else k.shape[1]):
        shared = by_head[g : g + 1] if heads == "query" else by_head[g * groups : (g + 1) * groups]
        value = [sum(x) / len(shared) for x in zip(*shared, strict=True)]
        order = sorted(forced) + sorted((c for c in allowed if c not in forced), key=lambda c: -value[c])
        lists.append(order[: max(count(budget, [value[c] if c in scored else 0.0 for c in order]), len(forced))])
    return lists


def count(budget, weights):
    n = len(weights)
    if budget.mass is not None:
        wanted, found = budget.mass * sum(weights), 0
        while found < n and sum(weights[:found]) < wanted - 1e-9:
            found += 1
    elif budget.fixed is not None:
        found = budget.fixed
    else:
        exact = budget.fraction * n if budget.fraction is not None else budget.alpha * n**budget.exponent
        found = math.ceil(exact - 1e-9)
    return min(max(found, budget.least), budget.most or n, n)
