"""Fixed sparse patterns against their published sets of keys, one query and head at a time, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_models import ROPES, feed, make, same, stir

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context, Mixer
from zoo.architectures.core.rope import RotaryTable
from zoo.errors import ZooError

CONFIG = DecoderConfig(vocab_size=97, hidden_size=64, layers=(), ropes=ROPES)
T = 29
Counts = Callable[[int, int, int], int]  # query, key, head -> how often the key counts; the order is checked apart


def strided(args: dict[str, Any]) -> Counts:
    length, part = args["stride"], args.get("part", "both")
    local = lambda i, j: abs(i - j) <= length  # noqa: E731
    column = lambda i, j: (i - j) % length == 0  # noqa: E731
    sets = {"both": (local, column), "local": (local,), "column": (column,)}[part]
    return lambda i, j, h: int(any(seen(i, j) for seen in sets))


def fixed(args: dict[str, Any]) -> Counts:
    block, part = args["block"], args.get("part", "both")
    local = lambda i, j: i // block == j // block  # noqa: E731
    column = lambda i, j: j % block in range(block - args["summary"], block)  # noqa: E731
    sets = {"both": (local, column), "local": (local,), "column": (column,)}[part]
    return lambda i, j, h: int(any(seen(i, j) for seen in sets))


def dilated(args: dict[str, Any]) -> Counts:
    def counts(i: int, j: int, h: int) -> int:
        found = 0
        for w, r in zip(args["segments"], args["dilations"], strict=True):
            rows = [range(start + h % r, start + w, r) for start in range(0, T, w)]
            found += any(i in row and j in row for row in rows)
        return found

    return counts


def log_sparse(args: dict[str, Any]) -> Counts:
    far = {0, 1, 2, 4, 8, 16} | set(range(args.get("local", 1)))
    cut = args.get("restart") or T
    return lambda i, j, h: int(i - j in far and i // cut == j // cut)


COUNTS = {"strided": strided, "fixed": fixed, "dilated": dilated, "log_sparse": log_sparse}
CASES = [
    (name, args)
    for name in COUNTS
    for args in (registry.get("mixers", name, "EXAMPLE"), *registry.get("mixers", name, "VARIANTS").values())
]


def naive(q: Tensor, k: Tensor, v: Tensor, counts: Counts, causal: bool) -> Tensor:
    """`q, k, v [T, H, K]`."""
    rows = []
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            often = [counts(i, j, h) if j <= i or not causal else 0 for j in range(k.shape[0])]
            weights = torch.tensor(often).double() * torch.exp(k[:, h] @ q[i, h] * q.shape[2] ** -0.5)
            total = weights.sum()
            rows.append(weights @ v[:, h] / total if total > 0 else torch.zeros_like(v[0, h]))
    return torch.stack(rows).view(*q.shape[:2], -1)


def context(causal: bool = True) -> Context:
    positions = torch.arange(T)[None]
    ropes = {name: RotaryTable(rope, 2048)(positions) for name, rope in ROPES.items()}
    return Context(phase="train", positions=positions, causal=causal, ropes=ropes)


def build(name: str, args: dict[str, Any]) -> Mixer:
    cls = registry.get("mixers", name, "MODULE")
    module: Mixer = cls(CONFIG, cls.parse(args)).double()
    stir(module, std=0.2)
    return module


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("name", "args"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_the_keys_are_those_of_the_paper(name: str, args: dict[str, Any], causal: bool) -> None:
    module, ctx = build(name, args), context(causal)
    if not causal and not module.bidirectional:
        return
    x = torch.randn(1, T, 64, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        q, k, v = (part[0] for part in module.expanded_qkv(x, ctx))
        expected = module.get_submodule("o_proj")(naive(q, k, v, COUNTS[name](args), causal).flatten(-2))
        same(module(x, ctx)[0], expected, 1e-12)


BOUNDED = {
    "strided/local": 4,  # the stride
    "fixed/local": 4,  # a block without its last token
    "dilated": 11,  # the greatest segment without its last token
    "log_sparse/restart": 5,
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_only_what_can_still_be_seen_is_kept(kind: str) -> None:
    model = make([kind, kind])
    _, cache = feed(model, torch.randint(1, 90, (1, 40)), [39, 1])
    for layer in cache.layers:
        assert {state.tensor.shape[1] for state in layer._states.values()} == {BOUNDED[kind]}


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("strided", dict(stride=0), "stride was 0"),
        ("strided", dict(stride=2, part="row"), "part was 'row'"),
        ("fixed", dict(block=4, summary=4), "summary was 4"),
        ("dilated", dict(segments=(4, 8), dilations=(1,)), "must be pairs"),
        ("dilated", dict(segments=(4, 8), dilations=(2, 4)), "one must be 1"),
        ("log_sparse", dict(local=0), "local was 0"),
    ],
)
def test_a_bad_pattern_is_refused(name: str, args: dict[str, Any], message: str) -> None:
    cls = registry.get("mixers", name, "MODULE")
    with pytest.raises(ZooError, match=message):
        cls.parse({"heads": 4, "head_dim": 16, **args}).check(CONFIG)
