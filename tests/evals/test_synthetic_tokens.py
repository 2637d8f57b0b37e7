"""Token tasks: solvers that know the answer, none of it, or what stands in the last tokens; labels a second time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from conftest import TokenSolver

from zoo.errors import ZooError
from zoo.evals import induction_heads, mad, mqar, selective_copy, state_tracking
from zoo.evals.core import labelled, mad_rows

# the answer after a prefix whose first `hidden` tokens are cut off, and the first place that it takes; None: unknown
Solve = Callable[[list[int], int], tuple[int, int] | None]


@dataclass(frozen=True)
class Case:
    """A task with small options, its rows, the tokens it draws from, and who can do it."""

    task: Any
    options: dict[str, Any]
    row: Callable[[int], labelled.Labelled]
    tokens: int
    solve: Solve
    window: int = 24
    samples: int = 6

    def score(self, solve: Callable[[list[int], int], int], window: int | None = None, **options: Any) -> Any:
        model = TokenSolver(solve, self.tokens + 1, window)
        return self.task.evaluate(model, **{"samples": self.samples, **self.options, **options})

    def known(self, ids: list[int], hidden: int) -> int:
        found = self.solve(ids, hidden)
        return self.tokens if found is None else found[0]  # a token beyond the task's is never right

    def within(self, window: int) -> float:
        """Mean over rows of the share of labels whose answer stands in the last `window` tokens."""
        shares = []
        for ids, labels in map(self.row, range(self.samples)):
            asked = [p for p, label in enumerate(labels) if label != labelled.IGNORE]
            found = [self.solve(ids[: p + 1], 0) for p in asked]
            shares.append(sum(f is not None and f[1] > p - window for p, f in zip(asked, found, strict=True)))
            shares[-1] /= len(asked)
        return sum(shares) / len(shares)


def listed(told: int, width: int) -> Solve:
    """Looks a key of `width` tokens up among the `told` first tokens of the row; the last entry counts."""

    def solve(ids: list[int], hidden: int) -> tuple[int, int] | None:
        for start in reversed(range(0, told, width + 1)):
            at = start - hidden
            if 0 <= at < len(ids) - 2 * width and ids[at : at + width] == ids[-width:]:
                return ids[at + width], at
        return None

    return solve


def latest(ids: list[int], hidden: int) -> tuple[int, int] | None:
    """What followed the last token when it came before."""
    places = [i for i in range(len(ids) - 1) if ids[i] == ids[-1]]
    return (ids[places[-1] + 1], places[-1]) if places else None


def copied(length: int, copies: int, blank: int, first: int) -> Solve:
    """Tokens among the `length` first ones; the first of them is asked for at place `first`."""

    def solve(ids: list[int], hidden: int) -> tuple[int, int] | None:
        told = [i for i in range(min(len(ids), length - hidden)) if ids[i] != blank]
        left = copies - (len(ids) + hidden - 1 - first)
        return (ids[told[-left]], told[-left]) if 0 < left <= copies and left <= len(told) else None

    return solve


def fuzzy(ids: list[int], hidden: int) -> tuple[int, int] | None:
    """Keys of three tokens below 7, values of some tokens from 7 to 14."""
    end = len(ids)
    while end and 7 <= ids[end - 1] < 15:
        end -= 1
    key, read = ids[max(0, end - 3) : end], len(ids) - end
    for i in reversed(range(end - 5)):
        if ids[i : i + 3] == key and len(key) == 3 and i + 3 + read < end - 3:
            return ids[i + 3 + read], i
    return None


@cache
def learned() -> dict[int, int]:
    """The values that rows for training give to each key."""
    seen, labels = mad_rows.rows("memorization", 100, seed=1)
    return dict(zip(seen[:, ::2].flatten().tolist(), labels[:, 1::2].flatten().tolist(), strict=True))


def by_heart(ids: list[int], hidden: int) -> tuple[int, int] | None:
    return (learned()[ids[-2]], len(ids) - 2) if len(ids) > 1 and ids[-2] in learned() else None


def permuted(things: int) -> Solve:
    """The product of permutation matrices."""
    elements = sorted(permutations(range(things)))
    matrices = [np.eye(things, dtype=int)[list(element)] for element in elements]

    def solve(ids: list[int], hidden: int) -> tuple[int, int] | None:
        product = np.eye(things, dtype=int)
        for token in ids:
            product = product @ matrices[token]
        return None if hidden else (elements.index(tuple(product.argmax(1).tolist())), 0)

    return solve


def mqar_case(length: int, pairs: int, told: int, width: int = 1, **options: Any) -> Case:
    return Case(
        mqar, {"grid": [(length, pairs)], "vocab_size": 64, **options},
        lambda i: mqar.row(length, pairs, i, 0, vocab_size=64, **options), 64, listed(told, width), window=length // 2,
    )  # fmt: skip


def mad_case(task: str, solve: Solve, length: int = 64, window: int = 24, **changes: Any) -> Case:
    base = mad_rows.BASELINES[task]
    setting = mad_rows.Setting(**{**base.__dict__, "length": length, **changes})
    options = {"tasks": [task], "length": length, **changes}
    return Case(mad, options, lambda i: mad_rows.row(task, i, 0, setting), base.vocab_size, solve, window)


def tracking_case(group: str, things: int) -> Case:
    options = {"groups": [group], "lengths": [32]}
    tokens = math.factorial(things)
    return Case(state_tracking, options, lambda i: state_tracking.row(group, 32, i, 0), tokens, permuted(things))


CASES = {
    "mqar": mqar_case(64, 8, 16),
    "mqar-noise": mqar_case(64, 8, 16, noise=True),
    "mqar-compositional": mqar_case(90, 9, 27, width=2, form="compositional"),
    "mqar-forgetting": mqar_case(64, 8, 24, form="forgetting"),
    "selective_copy": Case(
        selective_copy, {"lengths": [40], "copies": 5}, lambda i: selective_copy.row(40, i, 0, 5), 16,
        copied(40, 5, 14, 40),
    ),
    "induction_heads": Case(
        induction_heads, {"lengths": [48]}, lambda i: induction_heads.row(48, i, 0), 16, latest, samples=30
    ),
    "parity": tracking_case("parity", 2),
    "s5": tracking_case("s5", 5),
    "mad-recall": mad_case("in_context_recall", latest, window=12),
    "mad-noisy": mad_case("noisy_in_context_recall", latest),
    "mad-fuzzy": mad_case("fuzzy_in_context_recall", fuzzy, length=128, window=64),
    "mad-copying": mad_case("selective_copying", copied(58, 5, 14, 59), window=40, copies=5),
    "mad-memorization": mad_case("memorization", by_heart, length=32, window=1),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each_case
def test_an_oracle_scores_one(case: Case) -> None:
    result = case.score(case.known)
    assert {row.value for row in result.rows} == {1.0} and result.rows[0].n == case.samples


@each_case
def test_a_random_model_scores_chance(case: Case) -> None:
    rng = random.Random(0)
    result = case.score(lambda ids, hidden: rng.randrange(case.tokens), samples=20)
    pairs = [pair for record in result.records for pair in zip(record.output, record.answers, strict=True)]
    n, p = len(pairs), 1 / case.tokens
    assert abs(sum(a == b for a, b in pairs) - n * p) <= 2.6 * math.sqrt(n * p * (1 - p)) + 0.5  # 99%
    shares = [record.scores["accuracy"] for record in result.records]
    assert result.value("accuracy") == pytest.approx(sum(shares) / 20)


@each_case
def test_a_short_memory_scores_the_share_within_it(case: Case) -> None:
    expected = case.within(case.window)
    assert case.score(case.known, case.window).value("accuracy") == pytest.approx(expected, abs=1e-12)
    assert expected == 0 if case.window == 1 else 0.05 < expected < 0.95


@each_case
def test_samples_do_not_depend_on_how_many_there_are(case: Case) -> None:
    few, many, other = (
        case.score(lambda ids, hidden: 0, samples=samples, seed=seed).records
        for samples, seed in [(2, 0), (4, 0), (2, 1)]
    )
    assert few == many[:2] and [r.prompt for r in few] != [r.prompt for r in other]
    assert many[0].prompt != many[1].prompt
    shown = [" ".join(map(str, case.row(i)[0][-labelled.SHOWN :])) for i in range(4)]
    assert [record.prompt for record in many] == shown


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (mqar, {"grid": "zoo"}, "grid 'zoo' is unknown; choose one of: zoology, based"),
        (mqar, {"form": "x"}, "form 'x' is unknown"),
        (mqar, {"grid": [(20, 6)], "vocab_size": 64}, "length was 20; 6 pairs of form 'plain' need at least 24"),
        (mqar, {"grid": [(90, 8)], "form": "compositional"}, "pairs was 8; it must be a positive square"),
        (mqar, {"grid": [(900, 40)], "vocab_size": 64}, "a vocabulary of 64 has keys and values for 31"),
        (mqar, {"grid": [3]}, "it must be a list of"),
        (mqar, {"grid": [(5000, 4)]}, "length 5000 is beyond the model's 4096"),
        (mqar, {"vocab_size": 300}, "vocab_size was 300; it must be between 6 and the model's 258"),
        (selective_copy, {"lengths": [8]}, "length was 8; it must be at least copies, 16"),
        (selective_copy, {"lengths": [4090]}, "length 4106 is beyond"),
        (induction_heads, {"lengths": [2]}, "length was 2; it must be at least 3"),
        (state_tracking, {"groups": ["s6"]}, "group 's6' is unknown; choose one of: parity, s5"),
        (mad, {"tasks": ["recall"]}, "tasks has 'recall'; choose from: in_context_recall"),
        (mad, {"tasks": ["compression"]}, "it needs an AutoEncoder"),
        (mad, {"noise": 1.0}, "noise was 1.0"),
        (mad, {"tasks": ["selective_copying"], "length": 20}, "length of selective_copying was 20"),
        (mad, {"vocab_size": 3}, "vocab_size of in_context_recall was 3; it must be 4 to 258"),
        (mad, {"tasks": []}, r"tasks was \[\]"),
        (induction_heads, {"samples": 0}, "samples was 0; it must be at least 1"),
    ],
)
def test_bad_options_are_one_line(task: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message) as caught:
        task.evaluate(TokenSolver(lambda ids, hidden: 0, 258), **options)
    assert "\n" not in str(caught.value)


def test_a_small_model_gets_the_tasks_that_it_holds() -> None:
    model = TokenSolver(lambda ids, hidden: 0, 40)
    model.config.max_position_embeddings = 200
    recall = ["in_context_recall", "noisy_in_context_recall", "fuzzy_in_context_recall"]
    assert list(mad.evaluate(model, samples=1).options["settings"]) == recall  # copying is longer, memorization wider
    assert mqar.evaluate(model, samples=1, vocab_size=36).options["grid"] == [[64, 4], [128, 8]]
    model.config.max_position_embeddings = 20
    with pytest.raises(ZooError, match="the model has no room for any"):
        mad.evaluate(model)
