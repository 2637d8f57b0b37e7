"""Methods that choose keys while decoding, against their definitions, one query and head at a time, in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoding_models import (
    BASE,
    CONFIG,
    PROMPT,
    Sets,
    T,
    build,
    cached,
    decoded,
    inputs,
    projected,
)
from torch import Tensor
from transformers import DynamicCache
from zoo_models import draw, feed, forward, make, same, static_cache

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.rectify import rectify
from zoo.architectures.core.sparse import View
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.errors import ZooError


def wanted(budget: Any, n: int, weights: Sequence[float]) -> int:
    """Blocks of n that the budget allows, the weights being those of the blocks in order of their scores."""
    if not isinstance(budget, dict):
        budget = {"fraction": budget} if isinstance(budget, float) else {"fixed": budget}
    if "mass" in budget:
        sums = [sum(weights[: i + 1]) for i in range(len(weights))]
        found = next(i + 1 for i, total in enumerate(sums) if total >= budget["mass"] * sums[-1] * (1 - 1e-9))
        found += n - len(weights)
    elif "alpha" in budget:
        found = math.ceil(budget["alpha"] * n ** budget.get("exponent", 0.5) - 1e-9)
    else:
        found = budget["fixed"] if "fixed" in budget else math.ceil(budget["fraction"] * n - 1e-9)
    return min(max(found, budget.get("least", 1)), budget.get("most", n), n)


def bound(q: Tensor, page: Tensor) -> float:
    return float(torch.maximum(q * page.amax(0), q * page.amin(0)).sum()) * q.shape[0] ** -0.5


def top_pages(scores: list[float], args: Any, local: int, n: int) -> set[int]:
    """The tokens of the best pages by the scores of all pages before the newest."""
    order = sorted(range(len(scores)), key=lambda p: (p < n - local, -scores[p]))
    budget = -(-args.budget // args.page) if isinstance(args.budget, int) else args.budget
    # the newest page has no weight of its own, and neither has any that is forced
    before = [scores[p] for p in range(n - 1)]
    total = sum(before) or 1.0
    ranked = [p for p in order if p < n - 1] if local == 1 else []
    count = max(wanted(budget, n, [before[p] / total for p in ranked]), min(local, n))
    return set(order[:count])


def tokens_of(pages: set[int], size: int, t: int) -> set[int]:
    return {j for p in pages for j in range(p * size, (p + 1) * size) if j <= t}


def quest(q: Tensor, k: Tensor, args: Any, t: int) -> list[set[int]]:
    group, n, seen = q.shape[0] // k.shape[1], t // args.page + 1, []
    for h in range(q.shape[0]):
        g = h // group
        rows = [[bound(q[i], k[p * args.page : (p + 1) * args.page, g]) for p in range(n - 1)]
                for i in range(g * group, (g + 1) * group)]  # fmt: skip
        shared = torch.tensor(rows, dtype=torch.float64).softmax(-1).mean(0).tolist() if n > 1 else []
        seen.append(tokens_of(top_pages([*shared, 0.0], args, 1, n), args.page, t))
    return seen


def resa(q: Tensor, k: Tensor, args: Any, t: int) -> list[set[int]]:
    group, n, seen = q.shape[0] // k.shape[1], t // args.page + 1, []
    for g in range(k.shape[1]):
        mean = q[g * group : (g + 1) * group].mean(0)
        scores = [bound(mean, k[p * args.page : (p + 1) * args.page, g]) for p in range(n)]
        seen += [tokens_of(top_pages(scores, args, args.local, n), args.page, t)] * group
    return seen


def double_sparsity(q: Tensor, k: Tensor, args: Any, t: int) -> list[set[int]]:
    group, seen = q.shape[0] // k.shape[1], []
    for h in range(q.shape[0]):
        g = h // group
        labels = list(args.channels[g])
        heads = range(g * group, (g + 1) * group) if args.share else [h]
        scores = torch.stack([k[:t, g][:, labels] @ q[i, labels] for i in heads]) * q.shape[1] ** -0.5
        shared = scores.softmax(-1).mean(0) if args.share else scores[0]
        count = wanted(args.budget, t + 1, [])
        seen.append({t, *shared.topk(min(count - 1, t)).indices.tolist()})
    return seen


CHANNELS = ((3, 11, 5), (0, 8, 1))
CASES: list[tuple[str, dict[str, Any], Sets]] = [
    ("quest", {"budget": 32}, quest),
    ("quest", {"budget": 0.4}, quest),
    ("quest", {"budget": {"mass": 0.5}}, quest),
    ("quest", {"budget": {"alpha": 1.0, "exponent": 0.5, "most": 3}}, quest),
    ("quest", {"budget": {"fixed": 1, "least": 2}, "page": 20}, quest),
    ("resa", {"budget": {"fraction": 0.1, "least": 2}}, resa),
    ("resa", {"budget": 48, "local": 2}, resa),
    ("double_sparsity", {"budget": 9, "channels": CHANNELS}, double_sparsity),
    ("double_sparsity", {"budget": 0.2, "channels": CHANNELS, "share": True}, double_sparsity),
]
IDS = [f"{name}-{'-'.join(map(str, args.values()))}" for name, args, _ in CASES]


@pytest.mark.parametrize(("name", "args", "sets"), CASES, ids=IDS)
def test_decoding_reads_the_keys_of_the_definition(name: str, args: dict[str, Any], sets: Sets) -> None:
    module, x = build(name, **args), inputs()
    found = cached(module, x, [PROMPT, *[1] * (T - PROMPT)])
    for row in range(2):
        same(found[row, PROMPT:], decoded(module, x[row], sets, PROMPT), 1e-10)
    dense = decoded(module, x[0], lambda q, k, a, t: [set(range(t + 1))] * 4, PROMPT)
    assert (found[0, PROMPT:] - dense).abs().max() > 1e-3  # fewer keys do make a difference


@pytest.mark.parametrize(("name", "args", "sets"), [CASES[0], CASES[6], CASES[7]], ids=["quest", "resa", "double"])
@pytest.mark.parametrize("static", [False, True])
def test_notes_follow_the_cache(name: str, args: dict[str, Any], sets: Sets, static: bool) -> None:
    """Chunks between decoded tokens, padding before the first ones, pages that grow beyond the notes' room."""
    module, x, pads = build(name, **args), inputs(), 5
    sizes = [20, 1, 1, 17, 1, 1, 1, 9, *[1] * (T - 51)]
    found = cached(module, x, sizes, static, pads)
    steps = [i for i, size in enumerate(sizes) if size == 1]
    at = [sum(sizes[:i]) for i in steps]
    rows = decoded(module, x[0, pads:], sets, 0), decoded(module, x[1], sets, 0)
    same(found[0, at], rows[0][[t - pads for t in at]], 1e-10)
    same(found[1, at], rows[1][at], 1e-10)


def test_every_budget_of_all_keys_is_dense_attention() -> None:
    x = inputs(1)
    dense = build("attention")
    expected = cached(dense, x, [T])
    for name in ("quest", "double_sparsity", "resa", "streaming_llm", "duo_attention"):
        for budget in (1.0, T) if name in ("quest", "streaming_llm") else (T,):
            module = build(name, budget=budget, **({"sinks": 4} if name == "duo_attention" else {}))
            module.load_state_dict(dense.state_dict())
            same(cached(module, x, [T - 9, *[1] * 9]), expected, 1e-12)


@pytest.mark.parametrize("removed", [6, 1])
def test_notes_are_dropped_with_the_keys(removed: int) -> None:
    """A cache that went back and saw other tokens gives, and notes, what one does that saw these at once."""
    for name in ("quest", "double_sparsity", "resa"):
        model = make(_stacked(name, budget=16))
        ids, other = draw(1, 63), draw(1, 6, seed=5)
        _, cache = feed(model, ids, [55, *[1] * 8])
        cache.crop(removed)
        found, _ = feed(model, other, [1] * 6, cache=cache)
        both = torch.cat([ids[:, : 63 - removed], other], 1)
        expected, true = feed(model, both, [55, *[1] * (len(both[0]) - 55)])
        same(found, expected[:, 63 - removed :], 1e-6)
        full = cache.get_seq_length() // (1 if name == "double_sparsity" else 16)
        for a, b in zip(cache.layers, true.layers, strict=True):
            same(a.notes["pages"][:, :full], b.notes["pages"][:, :full], 1e-6)


def _stacked(name: str, layers: int = 2, **args: Any) -> ZooConfig:
    config = _config(name, args, layers)
    return ZooConfig.from_decoder(config, "test")


def _config(name: str, args: dict[str, Any], layers: int) -> DecoderConfig:
    from zoo_models import swiglu_layer

    return replace(CONFIG, layers=(swiglu_layer(name, BASE | args),) * layers)


# ---- double sparsity ------------------------------------------------------------------------------------------------
def test_label_channels_are_those_that_weigh_most() -> None:
    module, x = build("double_sparsity", labels=3), inputs(1)
    q, k, v = projected(module, x[0])
    calibrate = registry.get("mixers", "double_sparsity", "calibrate")
    found = calibrate(View(q[None], k[None], v[None]), module.args)
    for g in range(2):
        weight = [
            sum(abs(float(q[t, h, c] * k[t, g, c])) for t in range(T) for h in (2 * g, 2 * g + 1)) for c in range(16)
        ]
        assert set(found["channels"][g]) == set(sorted(range(16), key=lambda c: -weight[c])[:3])
    pads = torch.tensor([4])
    loud = q[None].clone()
    loud[:, :4] *= 1e3  # padding
    padded = calibrate(View(loud, k[None], v[None], starts=pads), module.args)
    assert padded == calibrate(View(q[None, 4:], k[None, 4:], v[None, 4:]), module.args)
    build("double_sparsity", **found)


# ---- rectification --------------------------------------------------------------------------------------------------
def kept(cache: DynamicCache, tokens: int) -> Tensor:
    parts = [layer.get(name)[:, :tokens] for layer in cache.layers for name in "kv"]
    return torch.stack(parts)


@pytest.mark.parametrize("static", [False, True])
def test_rectified_keys_are_those_of_a_dense_model(static: bool) -> None:
    sparse = make(_stacked("resa", 3, budget=16, frequency=8)).double()
    dense = make(_stacked("resa", 3, budget=1.0)).double()
    ids, mask = draw(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :5] = 0
    _, true = feed(dense, ids, [60], attention_mask=mask)
    cache = static_cache(sparse, 64) if static else DynamicCache()
    _, cache = feed(sparse, ids, [50, *[1] * 10], cache=cache, attention_mask=mask)
    assert (kept(cache, 60) - kept(true, 60))[:, :, 50:].abs().max() > 1e-4
    rectify(sparse, cache, ids, 10, mask)
    real = mask.bool()[None, :, :, None, None].expand_as(kept(true, 60))
    same(kept(cache, 60)[real], kept(true, 60)[real], 1e-11)
    assert int(cache.get_seq_length()) == 60
    noted = {name: value.clone() for name, value in cache.layers[1].notes.items() if isinstance(value, Tensor)}
    cache.layers[1].notes.clear()
    with torch.no_grad():
        after = torch.cat([mask, mask[:, :1] | 1], 1)
        sparse(ids[:, :1], past_key_values=cache, attention_mask=after, use_cache=True)
    full = cache.layers[1].notes["pages"][1, :3]
    assert torch.equal(noted["pages"][1, :3], full)  # notes were brought up to date, not lost


def test_generate_rectifies_by_itself() -> None:
    """As a loop by hand that decodes, and rectifies after every fourth token."""
    model = make(_stacked("resa", 3, budget=16, frequency=4), seed=2)
    ids = draw(2, 40)
    texts = model.generate(ids, max_new_tokens=14, do_sample=False, pad_token_id=0)
    found = []
    for every in (4, 100):
        seen, cache = ids, DynamicCache()
        logits, cache = feed(model, ids, [40], cache=cache)
        for step in range(1, 14):
            seen = torch.cat([seen, logits[:, -1:].argmax(-1)], 1)
            logits, _ = feed(model, seen[:, -1:], [1], cache=cache)
            if step % every == 0:
                rectify(model, cache, seen, every)
        found.append(torch.cat([seen, logits[:, -1:].argmax(-1)], 1))
        states = kept(cache, 53)
        if every == 4:
            rectified = states
    assert torch.equal(texts, found[0])
    assert (rectified - states).abs().max() > 1e-4
    static = model.generate(ids, max_new_tokens=14, do_sample=False, pad_token_id=0, cache_implementation="static")
    assert torch.equal(static, texts)
    model.generate(ids, max_new_tokens=14, num_beams=2, do_sample=False, pad_token_id=0)


def test_rectification_needs_a_cache_that_can_go_back() -> None:
    from zoo_models import swiglu_layer

    layers = (swiglu_layer("resa", BASE | {"frequency": 2}), swiglu_layer("streaming_llm", BASE | {"budget": 9}))
    model = make(ZooConfig.from_decoder(replace(CONFIG, layers=layers), "test"))
    with pytest.raises(ZooError, match="frequency 0"):
        model.generate(draw(1, 20), max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.mark.slow
def test_decoding_with_notes_compiles_without_a_break() -> None:
    layers = [_config(name, {"budget": 16}, 1).layers[0] for name in ("quest", "double_sparsity")]
    model = make(ZooConfig.from_decoder(replace(CONFIG, layers=tuple(layers)), "test"))
    ids, new = draw(2, 40), draw(2, 4, seed=6)
    expected, _ = feed(model, torch.cat([ids, new], 1), [40, 1, 1, 1, 1], cache=static_cache(model, 50))
    cache = static_cache(model, 50)
    feed(model, ids, [40], cache=cache)
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        outs = [step(token, past_key_values=cache, use_cache=True).logits for token in new.split(1, 1)]
    same(torch.cat(outs, 1), expected[:, 40:])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("quest", dict(page=8), "page was 8"),
        ("quest", dict(budget=0), "budget was 0"),
        ("resa", dict(page=1), "page was 1"),
        ("resa", dict(frequency=1), "frequency was 1"),
        ("resa", dict(local=0), "local was 0"),
        ("double_sparsity", dict(labels=17), "labels was 17"),
        ("double_sparsity", dict(channels=((1,),)), "for each of 2 KV heads"),
        ("double_sparsity", dict(channels=((1,), (16,))), "of 0 to 15"),
    ],
)
def test_bad_options_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        build(name, **args)


def test_one_forward_is_dense_where_a_method_decodes() -> None:
    ids = draw(1, 60)
    for name in ("quest", "double_sparsity", "resa"):
        same(forward(make(_stacked(name, budget=16)), ids), forward(make(_stacked(name, budget=1.0)), ids), 1e-6)
