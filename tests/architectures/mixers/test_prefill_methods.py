"""Methods that choose keys in prefill against their published rules: one mask per head, key by key, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive_prefill import (
    PATTERNS,
    B,
    T,
    attend,
    distance,
    flexprefill,
    minference,
    minference_by_mass,
    rows,
    scores_of,
    spargeattn,
    xattention,
)
from torch import Tensor
from zoo_models import ROPES, same

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.sparse import View
from zoo.errors import ZooError

NAMES = ("minference", "flexprefill", "xattention", "spargeattn")
SIZES = {"heads": 4, "head_dim": 8, "kv_heads": 2}
CONFIG = DecoderConfig(vocab_size=97, hidden_size=32, layers=(), ropes=ROPES)


def method(name: str, **options: Any) -> Any:
    cls = registry.get("mixers", name, "MODULE")
    args = cls.parse({**SIZES, "block": B, **options})
    args.check(CONFIG)
    return cls.method(args)


def view(tokens: int = T, batch: int = 1, seed: int = 0) -> View:
    """Keys that drift, so that blocks differ, and a few that all queries want."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, tokens, heads, 8, generator=draw).double() for heads in (4, 2, 2))
    places = torch.arange(tokens).double()[:, None, None] / 20
    turn = torch.cat([places.sin(), places.cos()], -1).repeat(1, 1, 4)
    k, q = k + 2 * turn, q + 2 * turn
    k[:, [1, 40, 77]] += 2 * q.mean((0, 1))[::2]
    return View(q, k, v)


BUDGETS = {
    "tokens": (48, lambda n: min(3, n)),
    "fraction": (0.4, lambda n: math.ceil(0.4 * n - 1e-9)),
    "root": ({"alpha": 1.5, "exponent": 0.5}, lambda n: min(math.ceil(1.5 * n**0.5 - 1e-9), n)),
    "most": ({"fraction": 0.9, "least": 2, "most": 4}, lambda n: min(max(math.ceil(0.9 * n - 1e-9), 2), 4, n)),
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_minference_reads_stripes_and_blocks(budget: str) -> None:
    x, (given, count) = view(), BUDGETS[budget]
    found = method("minference", budget=given, patterns=PATTERNS, near=3)(x)
    same(found, attend(x, minference(x, count)), 1e-12)


def test_minference_by_mass_reads_the_fewest_stripes() -> None:
    x, share = view(), 0.6
    found = method("minference", budget={"mass": share}, patterns=PATTERNS, near=3)(x)
    same(found, attend(x, minference_by_mass(x, share)), 1e-12)


def test_flexprefill_takes_pattern_and_budget_from_the_text() -> None:
    x = view()
    far = sorted(distance(x, h, scores_of(x).softmax(-1)[h]) for h in range(4))
    tau = (far[1] + far[2]) / 2
    for gamma in (0.5, 0.8):
        expected, trusted = flexprefill(x, tau, (gamma, 5))
        assert sum(trusted) == 2 and not expected[:, -1].all()
        found = method("flexprefill", budget={"mass": gamma}, tau=tau, min_budget=5)(x)
        same(found, attend(x, expected), 1e-12)
    for given, count in BUDGETS.values():
        same(method("flexprefill", budget=given, tau=tau)(x), attend(x, flexprefill(x, tau, count)[0]), 1e-12)


def test_flexprefill_min_budget_is_a_floor() -> None:
    x = view()
    expected, _ = flexprefill(x, 0.0, (0.05, 30))
    assert flexprefill(x, 0.0, (0.05, 1))[0].sum() < expected.sum()
    same(method("flexprefill", budget={"mass": 0.05}, tau=0.0, min_budget=30)(x), attend(x, expected), 1e-12)


@pytest.mark.parametrize("stride", [4, 16])
def test_xattention_scores_blocks_by_antidiagonals(stride: int) -> None:
    x = view()
    found = method("xattention", budget={"mass": 0.7}, stride=stride)(x)
    same(found, attend(x, xattention(x, stride, [0.7] * 4)), 1e-12)
    for given, count in (BUDGETS["fraction"], BUDGETS["most"]):
        same(method("xattention", budget=given, stride=stride)(x), attend(x, xattention(x, stride, count)), 1e-12)


def test_xattention_thresholds_are_of_each_head() -> None:
    x, thresholds = view(), [0.9, 0.5, 0.9, 0.7]
    found = method("xattention", thresholds=thresholds, stride=8)(x)
    same(found, attend(x, xattention(x, 8, thresholds)), 1e-12)
    assert not method("xattention", thresholds=thresholds, budget=1.0).args.everything


@pytest.mark.parametrize("smooth", [True, False])
def test_spargeattn_pools_blocks_that_are_alike(smooth: bool) -> None:
    x = view()
    theta = 0.57
    expected, alike = spargeattn(x, theta, 0.6, smooth)
    assert 8 < sum(alike) < len(alike) - 8
    found = method("spargeattn", budget={"mass": 0.6}, theta=theta, smooth=smooth, query_block=32)(x)
    same(found, attend(x, expected), 1e-12)
    for given, count in list(BUDGETS.values())[:3]:  # the choice is bounded, and not the rest
        found = method("spargeattn", budget=given, theta=theta, smooth=smooth, query_block=32)(x)
        same(found, attend(x, spargeattn(x, theta, count, smooth)[0]), 1e-12)


@pytest.mark.parametrize(("budget", "theta"), [({"mass": 0.7}, 0.6), (0.4, -0.1)])
def test_spargeattn_asks_for_less_alikeness_where_the_budget_is_in_blocks(budget: Any, theta: float) -> None:
    expected = method("spargeattn", budget=budget, theta=theta)(view())
    assert torch.equal(method("spargeattn", budget=budget)(view()), expected)
    assert not torch.equal(method("spargeattn", budget=budget, theta=0.65)(view()), expected)


@pytest.mark.parametrize("skip", [-0.5, -3.0])
def test_spargeattn_skips_blocks_as_they_come(skip: float) -> None:
    """The second stage as a loop with running maxima, sums and outputs."""
    x, size = replace(view(), q=2 * view().q, scale=1.0), 32
    seen, _ = spargeattn(replace(x, scale=None, q=x.q * 8**0.5), 0.35, lambda n: math.ceil(0.7 * n))
    scores, v, skipped = scores_of(x) * 8**0.5, x.v[0].repeat_interleave(2, 1), 0
    outgrown = 0  # blocks that later ones would have had skipped
    expected = torch.zeros(1, T, 4, 8, dtype=torch.float64)
    for h in range(4):
        for _, row in rows(size):
            top = torch.full((len(row),), -torch.inf, dtype=torch.float64)
            kept, total, out = [], torch.zeros_like(top), torch.zeros(len(row), 8, dtype=torch.float64)
            for c, keys in rows(B):
                if not seen[h, row, c * B].any():
                    continue
                part = scores[h, row][:, keys]
                local = part.amax(1)
                new = torch.maximum(top, local)
                factor, weights = (top - new).nan_to_num(0.0).exp(), (part - new[:, None]).exp()
                total, out, top = total * factor, out * factor[:, None], new
                if (local - new).nan_to_num(-torch.inf).max() < skip:
                    skipped += 1
                    continue
                kept.append(local)
                total, out = total + weights.nan_to_num(0.0).sum(1), out + weights.nan_to_num(0.0) @ v[keys, h]
            outgrown += sum(bool((local - top).max() < skip) for local in kept)
            expected[0, row, h] = out / total[:, None]
    assert skipped and outgrown
    found = method("spargeattn", budget=0.7, theta=0.35, query_block=size, skip=skip)(x)
    same(found, expected, 1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [1.0, T, {"fixed": 99}])
def test_a_budget_of_all_keys_is_dense_attention(name: str, budget: Any) -> None:
    x = view()
    same(method(name, budget=budget)(x), attend(x, torch.ones(4, T, T).tril().bool()), 1e-12)


CASES = [
    ("minference", dict(budget=40, patterns=PATTERNS)),
    ("minference", dict(budget={"mass": 0.8}, patterns=PATTERNS, last=20)),
    ("flexprefill", dict(budget={"mass": 0.6}, tau=0.35, min_budget=3)),
    ("flexprefill", dict(budget=0.3, tau=0.35)),
    ("xattention", dict(budget=40, stride=4)),
    ("xattention", dict(thresholds=(0.5, 0.7, 0.5, 0.6))),
    ("spargeattn", dict(budget={"mass": 0.5}, theta=0.57, query_block=32, skip=-1.5)),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_padding_packing_and_free_places_change_nothing(name: str, options: dict[str, Any]) -> None:
    rule, x, pads, free = method(name, **options), view(batch=2), torch.tensor([0, 21]), 30

    def alone(row: int, new: int, first: int = 0, end: int = T) -> Tensor:
        q, k, v = (y[row : row + 1, first:end] for y in (x.q, x.k, x.v))
        return rule(View(q[:, -new:], k, v))

    assert not torch.allclose(alone(0, T), attend(x, torch.ones(4, T, T).tril().bool()))
    padded = rule(replace(x, starts=pads))
    same(padded[:1], alone(0, T), 1e-12)
    same(padded[1:, 21:], alone(1, T - 21, 21), 1e-12)
    new = 75  # more queries beside cached keys, from a place where no block begins, in a buffer with free places
    k, v = (torch.cat([y, torch.randn(2, free, 2, 8).double()], 1) for y in (x.k, x.v))
    positions = torch.arange(T - new, T) - pads[:, None]
    found = rule(View(x.q[:, -new:], k, v, q_positions=positions, starts=pads))
    same(found[:1], alone(0, new), 1e-12)
    same(found[1:], alone(1, new, 21), 1e-12)
    bounds = torch.tensor([0, 67, 67, T], dtype=torch.int32)
    packed = rule(View(x.q[:1], x.k[:1], x.v[:1], cu_seqlens=bounds))
    same(packed, torch.cat([alone(0, 67, 0, 67), alone(0, T - 67, 67)], 1), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_attention_to_the_chosen_keys(name: str) -> None:
    x, stride = view(), 8
    count = BUDGETS["tokens"][1]
    seen = {
        "minference": lambda: minference(x, count, (("vertical_slash", 0.25),) * 4, near=30),
        "flexprefill": lambda: flexprefill(x, 0.1, count)[0],
        "xattention": lambda: xattention(x, stride, count),
        "spargeattn": lambda: spargeattn(x, -1.0, count)[0],
    }[name]()
    options = {"spargeattn": dict(theta=-1.0, query_block=32)}.get(name, {})
    grads = []
    for attention in (method(name, budget=48, **options), lambda y: attend(y, seen)):
        leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]
        attention(View(*leaves)).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for found, expected in zip(*grads, strict=True):
        assert found is not None and expected is not None
        same(found, expected, 1e-12)


def test_minference_calibrates_the_pattern_of_least_error() -> None:
    """Heads that attend nearby, to two keys, at one distance and to blocks of their own kind, each so that the estimate
    of another pattern misses it."""
    tokens, width, draw = 256, 32, torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, tokens, 4, width, generator=draw).double() / 4 for _ in range(2))
    v, number = torch.randn(1, tokens, 4, width, generator=draw).double(), torch.arange(tokens)
    sign = 1 - 2 * (number % 2)[:, None]  # means of keys are 0
    near = torch.nn.functional.one_hot(number // B, width)
    k[0, :, 0] += 3 * sign * near
    q[0, 32:-64, 0] += 20 * near[:-96]
    q[0, -64:, 0, 31], k[0, 100, 0, 31], v[0, 100, 0] = 40, 6, 0  # the newest queries want what the others do not
    q[0, :, 1, 0] += 8
    k[0, :, 1, 0] -= 1
    k[0, [60, 131], 1, 0] += 6
    code = sign * torch.randn(tokens // 2, width, generator=draw).double().repeat_interleave(2, 0)
    k[0, :, 2] += code
    q[0, 100:, 2] += 3 * code[:-100]
    kind = torch.nn.functional.one_hot(number // B * 7 % 5, width)
    k[0, :, 3] += 2 * kind
    q[0, :, 3] += 10 * kind
    x = View(q, k, v)
    module = registry.load("mixers", "minference")
    args = module.Args(heads=4, head_dim=width, block=B, budget=0.4, near=3)
    found = module.calibrate(x, args)
    dense, errors = x.dense(), []
    for pattern in module.GRID:
        o = module.MInference(replace(args, patterns=(pattern,) * 4))(x)
        errors.append([float((o - dense)[0, :, h].square().sum()) for h in range(4)])
    for h, (best, share) in enumerate(found["patterns"]):
        error = errors[module.GRID.index((best, share))][h]
        assert error == min(row[h] for row in errors)
        assert error < 0.9 * max(row[h] for row in errors)
    assert [best for best, _ in found["patterns"]] == ["a_shape", "vertical_slash", "vertical_slash", "block"]
    chosen = module.MInference(replace(args, patterns=found["patterns"]))(x)
    assert float((chosen - dense).square().sum()) == pytest.approx(sum(map(min, zip(*errors, strict=True))))


@pytest.mark.parametrize("name", NAMES)
def test_decode_alone_is_refused(name: str) -> None:
    rule = method(name)
    with pytest.raises(ZooError, match=f"method '{name}' chooses keys for prefill alone, not for decode"):
        rule.decode(view())
    x = replace(view(), q=view().q[:, -1:])
    same(rule(replace(x, decoding=True)), x.dense(), 1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("minference", dict(block=8), "block was 8"),
        ("minference", dict(patterns=(("block", 0.0),)), "patterns had 1; it must have one for each of 4 heads"),
        ("minference", dict(patterns=(("slash", 0.0),) * 4), "patterns had .'slash', 0.0."),
        ("minference", dict(patterns=(("block", 1.0),) * 4), "a share of 0 to below 1"),
        ("minference", dict(last=0), "last was 0"),
        ("minference", dict(near=-1), "near was -1"),
        ("flexprefill", dict(block=256), "block was 256"),
        ("flexprefill", dict(tau=1.5), "tau was 1.5"),
        ("flexprefill", dict(min_budget=0), "min_budget was 0"),
        ("flexprefill", dict(budget={"mass": 1.5}), "mass is 1.5"),
        ("xattention", dict(stride=5), "stride was 5; it must divide the block of 16"),
        ("xattention", dict(thresholds=(0.5,) * 3), "one for each of 4 heads"),
        ("xattention", dict(thresholds=(0.5, 0.0, 1.0, 1.0)), "thresholds had 0.0"),
        ("xattention", dict(budget=0), "budget was 0"),
        ("spargeattn", dict(query_block=0), "query_block was 0"),
        ("spargeattn", dict(theta=2.0), "theta was 2.0"),
        ("spargeattn", dict(skip=1.0), "skip was 1.0"),
    ],
)
def test_a_bad_option_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        method(name, **options)
