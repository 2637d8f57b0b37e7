"""Multi-query associative recall (Zoology, Arora et al. 2023, arXiv:2312.04927), for models trained on it.

Example with `length=16`, `pairs=2` (`.` is filler; a label judges the prediction after its token):

    ids     k1 v1 k2 v2  .  . k1  . k2  .  .  .  .  .  .  .
    labels   .  .  .  .  .  . v1  . v2  .  .  .  .  .  .  .

Keys are the first half of the vocabulary without 0, values the second; both are distinct within a row. A key comes back
at an even distance from the end of the list, near more often than far: slot g (from 1) has weight g ** (power - 1).
Forms: "plain"; "compositional", keys of two tokens on a square grid, of which neither half decides (`a x v1 a y v2 b x
v3 b y v4`); "forgetting", half of the keys are listed again with another value, and the later one is right. Where
Zoology may draw the old value again for such a key, this does not.

Models of other text know no such keys: they score about 0.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.labelled import IGNORE, Labelled, ask, stacked, vocabulary
from zoo.evals.core.records import summarised
from zoo.evals.core.result import Result

VERSION = 1
NEEDS = ()
VOCABULARY = 8192
POWER = 0.01
# (length, pairs): figure 2 of Zoology; figure 2 of Based (arXiv:2402.18668), tested and trained on
GRIDS = {
    "zoology": ((64, 4), (128, 8), (256, 16), (512, 64)),
    "based": ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)),
    "based-train": ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64)),
    "compositional": ((64, 4), (128, 16), (256, 36)),
}
Query = tuple[tuple[int, ...], int]


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    grid: str | Sequence[Sequence[int]] | None = None,
    form: str = "plain",
    noise: bool | None = None,
    vocab_size: int | None = None,
    samples: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on rows of each length and number of pairs.

    Args:
        tokenizer: not used.
        grid: (length, pairs) of each set, or "zoology", "based", "based-train", "compositional" (default: those of
            "zoology", or of "compositional" for that form, that the model holds).
        form: "plain", "compositional" or "forgetting".
        noise: random tokens as filler instead of 0 (default: on for Based's grids, as published).
        vocab_size: tokens to draw from (default: 8192, or the model's if that is less).
        samples: rows per set; row i depends on (form, length, pairs, i, seed) and the options above alone.
        seed: seed of everything.
        batch_tokens: tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `accuracy` at {"length": L, "pairs": K}: the share of a row's values that are predicted, mean over rows.

    Raises:
        ZooError: an unknown grid or form, a set that does not fit its length, the vocabulary or the model.
    """
    started = time.perf_counter()
    running.check_positive("mqar", samples=samples)
    if form not in FORMS:
        raise ZooError(f"task 'mqar': form {form!r} is unknown; choose one of: {', '.join(FORMS)}")
    size = vocabulary(model, "mqar", VOCABULARY, vocab_size, 6)
    noise = (grid in ("based", "based-train")) if noise is None else noise
    sets = _sets(model, grid, form)
    for length, pairs in sets:
        check(length, pairs, size, form)
        running.check_length(model, length, "mqar")
    records = []
    for length, pairs in sets:
        made = [row(length, pairs, i, seed, vocab_size=size, form=form, noise=noise) for i in range(samples)]
        records += ask(model, "mqar", made, {"length": length, "pairs": pairs}, batch_tokens)
    options = {"grid": [list(pair) for pair in sets], "form": form, "noise": noise, "vocab_size": size}
    return running.build(
        "mqar", VERSION, model, summarised(records, by=["length", "pairs"]),
        started=started, options={**options, "samples": samples}, seed=seed, records=records,
    )  # fmt: skip


def rows(length: int, pairs: int, n: int, seed: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Ids and labels `[N, L]` of `n` rows, for training; options as those of `row`."""
    return stacked(partial(_numbered, length, pairs, seed, options), n)


def _numbered(length: int, pairs: int, seed: int, options: dict[str, Any], sample: int) -> Labelled:
    return row(length, pairs, sample, seed, **options)


def row(
    length: int,
    pairs: int,
    sample: int,
    seed: int,
    *,
    vocab_size: int = VOCABULARY,
    form: str = "plain",
    noise: bool = False,
    power: float = POWER,
) -> Labelled:
    """Ids and labels of one row."""
    rng = random.Random(f"mqar/{form}/{length}/{pairs}/{sample}/{seed}")
    told, queries = FORMS[form](rng, pairs, vocab_size)
    ids, labels = told + [0] * (length - len(told)), [IGNORE] * length
    width = len(queries[0][0]) + 1
    for slot, (key, value) in zip(_slots(rng, (length - len(told)) // width, pairs, power), queries, strict=True):
        start = len(told) + width * slot
        ids[start : start + len(key)] = key
        labels[start + len(key) - 1] = value
    return [token or rng.randrange(vocab_size) for token in ids] if noise else ids, labels


def _slots(rng: random.Random, count: int, wanted: int, power: float) -> list[int]:
    """`wanted` of `count` slots drawn one after another without replacement, in the order in which they are drawn."""
    # the largest log(u) / weight come in just that order (Efraimidis and Spirakis 2006)
    drawn = ((math.log(1 - rng.random()) * (slot + 1) ** (1 - power), slot) for slot in range(count))
    return [slot for _, slot in heapq.nlargest(wanted, drawn)]


def _plain(rng: random.Random, pairs: int, vocab_size: int) -> tuple[list[int], list[Query]]:
    keys = rng.sample(range(1, vocab_size // 2), pairs)
    values = rng.sample(range(vocab_size // 2, vocab_size), pairs)
    entries = list(zip(keys, values, strict=True))
    return [token for entry in entries for token in entry], [((key,), value) for key, value in entries]


def _compositional(rng: random.Random, pairs: int, vocab_size: int) -> tuple[list[int], list[Query]]:
    third, side = vocab_size // 3, math.isqrt(pairs)
    first, second = rng.sample(range(1, third), side), rng.sample(range(third, 2 * third), side)
    keys = [(a, b) for a in first for b in second]
    rng.shuffle(keys)
    queries: list[Query] = list(zip(keys, rng.sample(range(2 * third, vocab_size), pairs), strict=True))
    return [token for key, value in queries for token in (*key, value)], queries


def _forgetting(rng: random.Random, pairs: int, vocab_size: int) -> tuple[list[int], list[Query]]:
    told, queries = _plain(rng, pairs, vocab_size)
    latest = dict(queries)
    for key in rng.sample(list(latest), pairs // 2):
        others = vocab_size - vocab_size // 2 - 1
        value = vocab_size // 2 + rng.randrange(others)
        latest[key] = value + (value >= latest[key])
        told += [*key, latest[key]]
    return told, list(latest.items())


FORMS: dict[str, Callable[[random.Random, int, int], tuple[list[int], list[Query]]]] = {
    "plain": _plain,
    "compositional": _compositional,
    "forgetting": _forgetting,
}


def check(length: int, pairs: int, vocab_size: int, form: str) -> None:
    """Raise `ZooError` if `pairs` do not fit the length or the vocabulary."""
    side = math.isqrt(max(0, pairs))
    if pairs < 1 or (form == "compositional" and side * side != pairs):
        raise ZooError(f"task 'mqar': pairs was {pairs}; it must be a positive {'square' if side else 'number'}")
    room = {"plain": 4 * pairs, "compositional": 6 * pairs, "forgetting": 4 * pairs + 2 * (pairs // 2)}[form]
    if length < room:
        raise ZooError(f"task 'mqar': length was {length}; {pairs} pairs of form {form!r} need at least {room}")
    third = vocab_size // 3
    held = min((third - 1) ** 2, third) if form == "compositional" else vocab_size // 2 - 1
    if pairs > held:
        raise ZooError(f"task 'mqar': pairs was {pairs}; a vocabulary of {vocab_size} has keys and values for {held}")


def _sets(model: Any, grid: str | Sequence[Sequence[int]] | None, form: str) -> list[tuple[int, int]]:
    if grid is None:
        limit = running.model_limit(model)
        found = GRIDS["compositional" if form == "compositional" else "zoology"]
        return [(length, pairs) for length, pairs in found if limit is None or length <= limit] or [found[0]]
    if isinstance(grid, str):
        if grid not in GRIDS:
            raise ZooError(f"task 'mqar': grid {grid!r} is unknown; choose one of: {', '.join(GRIDS)}, or give pairs")
        return list(GRIDS[grid])
    try:
        return [(int(length), int(pairs)) for length, pairs in grid]
    except (TypeError, ValueError):
        raise ZooError(f"task 'mqar': grid was {grid!r}; it must be a list of (length, pairs)") from None
