"""Methods that find keys by clusters, hashes or an index, against their definitions written out key by key in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_models import same

from zoo import registry
from zoo.architectures.core.clusters import kmeans
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.sparse import View
from zoo.errors import ZooError
from zoo.kernels.attention import attention

B, H, G, K, PROMPT, T = 2, 4, 2, 8, 45, 55
SIZES: dict[str, Any] = dict(heads=H, kv_heads=G, head_dim=K)
OPTIONS: dict[str, dict[str, Any]] = {
    "cluster_kv": dict(segment=12, cluster=4, sinks=2, iterations=4, budget=24),
    "magicpig": dict(bits=3, tables=6, window=8, sinks=3, budget=40),
    "retrieval_attention": dict(stride=5, neighbours=7, probes=2, window=6, sinks=3, budget=9),
}


def method(name: str, **options: Any) -> Any:
    cls = registry.get("mixers", name, "MODULE")
    args = cls.parse({**SIZES, **OPTIONS[name], **options})
    args.check_method()
    return cls.method(args)


def text(tokens: int = T, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys that do not lie around 0, and values, of `tokens` tokens, fp64."""
    draw = torch.Generator().manual_seed(seed)
    shift = torch.randn(1, 1, 1, K, dtype=torch.float64, generator=draw)
    q, k, v = (torch.randn(B, tokens, n, K, dtype=torch.float64, generator=draw) for n in (H, G, G))
    return 2 * q - shift, k + shift, v


def played(rule: Any, qkv: tuple[Tensor, ...], notes: bool = True, **kind: bool) -> Tensor:
    """Outputs of the tokens after the prompt, decoded one by one behind a prompt that was read in two calls."""
    pads, room = (5, 0) if kind.get("padded") else (0, 20 if kind.get("static") else 0)
    q, k, v = (torch.cat([x.new_full((B, pads, *x.shape[2:]), 9.0), x], 1) for x in qkv)
    buffers = [torch.cat([x, x.new_zeros(B, room, *x.shape[2:])], 1) for x in (k, v)]
    starts = torch.full((B,), pads) if pads or room else None
    held: dict[str, Any] | None = {} if notes else None
    outs = []
    for begin, end in ((0, 20), (20, pads + PROMPT), *((t, t + 1) for t in range(pads + PROMPT, pads + T))):
        seen = [x.clone() if room else x[:, :end] for x in buffers]
        if room:
            for x in seen:
                x[:, end:] = 0.0
        places = torch.arange(begin, end).expand(B, -1) - pads if starts is not None else None
        outs.append(rule(View(q[:, begin:end], *seen, end - begin == 1, places, starts, notes=held)))
    return torch.cat(outs[2:], 1)


def softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return ((k @ q * K**-0.5 + bias).softmax(0)[:, None] * v).sum(0)


def heads(qkv: tuple[Tensor, ...]) -> Iterator[tuple[int, int, int, Tensor, Tensor, Tensor]]:
    """Row, head and token of every query after the prompt, the query, and the keys and values up to it."""
    q, k, v = qkv
    for t in range(PROMPT, T):
        for b in range(B):
            for h in range(H):
                g = h // (H // G)
                yield b, h, t, q[b, t, h], k[b, : t + 1, g], v[b, : t + 1, g]


def gathered(outputs: list[Tensor]) -> Tensor:
    return torch.stack(outputs).view(T - PROMPT, B, H, K).transpose(0, 1)


@pytest.mark.parametrize("name", ["cluster_kv", "magicpig"])
def test_what_is_noted_is_what_all_keys_would_give(name: str) -> None:
    qkv = text()
    expected = played(method(name), qkv, notes=False)
    for kind in ({}, {"padded": True}, {"static": True}):
        same(played(method(name), qkv, **kind), expected, 1e-12)
    dense = played(method(name, budget=1.0), qkv)
    with pytest.raises(AssertionError):
        same(expected, dense, 1e-3)


def test_retrieval_is_the_same_however_the_cache_is_laid_out() -> None:
    qkv, rule = text(), method("retrieval_attention")
    expected = played(rule, qkv)
    same(played(rule, qkv, static=True), expected, 1e-12)
    alone = [(b, tuple(x[b : b + 1].expand(B, -1, -1, -1) for x in qkv)) for b in range(B)]
    for b, row in alone:
        same(played(rule, row, static=True)[:1], expected[b : b + 1], 1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_budget_of_all_keys_is_dense_attention(name: str) -> None:
    qkv = text()
    expected = gathered([softmax(q, k, v) for *_, q, k, v in heads(qkv)])
    same(played(method(name, budget=1.0), qkv), expected, 1e-12)
    if name != "magicpig":  # samples
        same(played(method(name, budget=T), qkv), expected, 1e-12)


def test_kmeans_is_lloyds_algorithm_on_directions() -> None:
    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels, means = kmeans(x, 4, 5)
    centres = [x[i * 30 // 4] for i in range(4)]
    for _ in range(5):
        members: list[list[Tensor]] = [[] for _ in centres]
        owners = []
        for vector in x:
            distances = [1 - torch.dot(vector, c) / (vector.norm() * c.norm()) for c in centres]
            owners.append(int(torch.stack(distances).argmin()))
            members[owners[-1]].append(vector)
        centres = [torch.stack(m).mean(0) if m else c for m, c in zip(members, centres, strict=True)]
    assert labels.tolist() == owners and len(set(owners)) == 4
    same(means, torch.stack(centres), 1e-12)


def test_kmeans_finds_planted_clusters_and_keeps_an_empty_one() -> None:
    directions = torch.eye(3, 8, dtype=torch.float64)
    x = directions.repeat_interleave(5, 0) + 0.05 * torch.randn(15, 8, generator=torch.Generator().manual_seed(1))
    labels, _ = kmeans(x, 3, 3)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    labels, means = kmeans(torch.ones(6, 4), 3, 2)
    assert set(labels.tolist()) == {0} and torch.isfinite(means).all()


@pytest.mark.parametrize("budget", [24, 0.5, {"mass": 0.6}])
def test_cluster_kv_takes_the_best_clusters_until_the_budget_is_full(budget: Any) -> None:
    qkv, rule = text(), method("cluster_kv", budget=budget)
    a, outputs = rule.args, []
    for b, h, t, q, k, v in heads(qkv):
        g, group = h // (H // G), H // G
        kept = [j for j in range(t + 1) if j < a.sinks or j > t - a.segment]
        shares: list[Tensor] = []  # of every clustered token, by the mean of its cluster
        means = []
        for begin in range(0, (t + 1) // a.segment * a.segment, a.segment):
            labels, centres = kmeans(k[begin : begin + a.segment], a.segment // a.cluster, a.iterations)
            means.append(centres[labels])
        tokens = torch.cat(means)
        for other in range(g * group, (g + 1) * group):
            shares.append((tokens @ qkv[0][b, t, other] * K**-0.5).softmax(0))
        weights = torch.stack(shares).mean(0)
        order = [j for j in weights.argsort(descending=True, stable=True).tolist() if j not in kept]
        if isinstance(budget, dict):
            total, chosen = weights[[j for j in kept if j < len(weights)]].sum(), list(kept)
            while total < budget["mass"] * weights.sum():
                chosen.append(order.pop(0))
                total = total + weights[chosen[-1]]
        else:
            most = budget if isinstance(budget, int) else math.ceil(budget * (t + 1))
            chosen = kept + order[: max(0, most - len(kept))]
        outputs.append(softmax(q, k[chosen], v[chosen]))
    same(played(rule, qkv), gathered(outputs), 1e-12)


def test_magicpig_samples_and_weighs_as_published() -> None:
    qkv, rule = text(), method("magicpig")
    a, outputs, sampled = rule.args, [], 0
    planes = rule.planes(qkv[0]).double()
    for _, _, t, q, k, v in heads(qkv):
        centre = k[a.sinks : a.sinks + a.window].mean(0)
        chosen, bias = [], []
        for j in range(t + 1):
            if j < a.sinks or j > t - a.window:
                chosen.append(j)
                bias.append(0.0)
                continue
            own, other = ((planes @ x > 0).tolist() for x in (q, k[j] - centre))
            if sum(x == y for x, y in zip(own, other, strict=True)) < 2:
                continue
            p = 1 - math.acos(torch.cosine_similarity(q, k[j] - centre, dim=0)) / math.pi
            u = 1 - (1 - p**a.bits) ** a.tables - a.tables * p**a.bits * (1 - p**a.bits) ** (a.tables - 1)
            chosen.append(j)
            bias.append(-math.log(u))
            sampled += 1
        outputs.append(softmax(q, k[chosen], v[chosen], torch.tensor(bias).double()))
    assert sampled > 100
    same(played(rule, qkv), gathered(outputs), 1e-8)


def test_magicpigs_numerator_and_denominator_are_unbiased() -> None:
    q, k, v = text(40, seed=3)
    view = View(q[:, -1:] / 2, k, v, decoding=True)
    exact, exact_lse = attention(view.q, k, v, return_lse=True)
    norm, total, seeds = torch.zeros(B, 1, H).double(), torch.zeros(B, 1, H, K).double(), 300
    for seed in range(seeds):
        rule = method("magicpig", bits=2, tables=8, seed=seed, budget=T)
        blocks, counts, bias = rule.sample(view)
        o, lse = view.attend_lse(blocks, counts, query_block=1, block=1, bias=bias, window=8, sink_tokens=3)
        share = (lse - exact_lse).exp()
        norm, total = norm + share / seeds, total + share[..., None] * o / seeds
    assert (norm - 1).abs().max() < 0.06
    same(total, exact, 0.06)


@pytest.mark.parametrize("budget", [9, 0.2, {"mass": 0.7}])
def test_retrieval_searches_the_lists_of_the_nearest_prompt_queries(budget: Any) -> None:
    qkv, rule = text(), method("retrieval_attention", budget=budget)
    a, outputs, fewer = rule.args, [], 0
    samples = [t for first, last in ((0, 19), (20, PROMPT - 1)) for t in range(last, first - 1, -a.stride)]
    for b, h, t, q, k, v in heads(qkv):
        boundary = (t + 1 - a.window) // a.window * a.window
        queries = qkv[0][b, samples, h]
        probed = (queries @ q).topk(a.probes).indices.tolist()
        found: set[int] = set()
        for s in probed:
            scores = k[a.sinks : boundary] @ queries[s]
            found |= {a.sinks + j for j in scores.topk(min(a.neighbours, len(scores))).indices.tolist()}
        candidates = sorted(found, key=lambda j: -float(k[j] @ q))
        shares = (k[candidates] @ q * K**-0.5).softmax(0)
        if isinstance(budget, dict):
            most = int((shares.cumsum(0) < budget["mass"] - 1e-9).sum()) + 1
        else:
            most = budget if isinstance(budget, int) else math.ceil(budget * (t + 1))
        static = [j for j in range(t + 1) if j < a.sinks or j > t - 2 * a.window]
        chosen = sorted(set(static) | set(candidates[:most]))
        fewer += len(chosen) < t + 1
        outputs.append(softmax(q, k[chosen], v[chosen]))
    assert fewer > 50
    same(played(rule, qkv), gathered(outputs), 1e-12)


def test_retrieval_by_prompt_queries_finds_what_queries_want_and_keys_do_not_tell() -> None:
    """Queries lie near one key each, in a part of the space that keys are far from."""
    draw = torch.Generator().manual_seed(0)
    tokens, wanted = 400, torch.randint(10, 300, (400,), generator=draw)
    k = torch.randn(1, tokens, 1, 32, generator=draw).double()
    offset = 3 * torch.randn(32, generator=draw).double()
    q = (k[:, wanted] + offset).repeat_interleave(1, 2)
    q = q + 0.3 * torch.randn(q.shape, generator=draw)
    cls = registry.get("mixers", "retrieval_attention", "MODULE")
    sizes = dict(heads=1, kv_heads=1, head_dim=32, stride=1, neighbours=8, probes=8, window=8, sinks=1, budget=8)
    rule, notes, hits = cls.method(cls.parse(sizes)), {}, 0
    rule(View(q[:, :340], k[:, :340], k[:, :340], notes=notes))
    for t in range(340, 400):
        view = View(q[:, t : t + 1], k[:, : t + 1], k[:, : t + 1], decoding=True, notes=notes)
        best = (k[0, 1 : (t - 7) // 8 * 8, 0] @ q[0, t, 0]).topk(8).indices + 1
        blocks, counts = rule.retrieve(view, rule.followed(view))
        hits += len(set(best.tolist()) & set(blocks[0, 0, 0, : counts[0, 0, 0]].tolist()))
    assert hits / (60 * 8) > 0.8


def test_retrieval_without_prompt_queries_scores_all_keys() -> None:
    qkv, rule = text(), method("retrieval_attention", window=1, sinks=0, budget=5)
    outputs = []
    for *_, t, q, k, v in heads(qkv):
        chosen = (k[: t - 0] @ q).topk(5).indices.tolist()
        chosen = sorted({t, t - 1} | set(chosen))
        outputs.append(softmax(q, k[chosen], v[chosen]))
    same(played(rule, qkv, notes=False), gathered(outputs), 1e-12)


CONFIG = DecoderConfig(vocab_size=8, hidden_size=64, layers=())


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cluster_kv", dict(segment=10, cluster=4), "cluster was 4; it must divide segment"),
        ("cluster_kv", dict(iterations=0), "iterations was 0"),
        ("cluster_kv", dict(budget=0), "budget was 0"),
        ("cluster_kv", dict(sinks=-1), "sinks was -1"),
        ("magicpig", dict(bits=16), "bits was 16; it must be at most 15"),
        ("magicpig", dict(tables=1), "tables was 1"),
        ("magicpig", dict(budget={"mass": 0.9}), "budget had mass"),
        ("retrieval_attention", dict(probes=0), "probes was 0"),
        ("retrieval_attention", dict(budget={"fraction": 2.0}), "fraction"),
    ],
)
def test_wrong_options_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    cls = registry.get("mixers", name, "MODULE")
    with pytest.raises(ZooError, match=message):
        cls.parse({"heads": 4, "head_dim": 16, **args}).check(CONFIG)
