"""Multi-step symbolic reasoning: a chain of assignments with arithmetic modulo 10.

Example with `steps=2` (the model is asked to continue it, and must produce ` 6`):

    All arithmetic is modulo 10.
    k = 7
    c = k + 5
    q = c * 3
    q =

Each line changes the variable of the line before by a sum, a difference or a product with a number; products are with
3, 7 or 9 alone, which have inverses modulo 10, so that every digit is as likely an answer as any other and chance is
0.1 for any number of steps. Variables are distinct letters.
"""

from __future__ import annotations

import random
import string
import time
from collections.abc import Sequence
from typing import Any

from zoo.evals.core import running
from zoo.evals.core.decoding import first_number
from zoo.evals.core.questions import Question, ask, check_sizes
from zoo.evals.core.records import summarised
from zoo.evals.core.result import Result
from zoo.evals.core.statistics import curve

VERSION = 1
NEEDS = ("tokenizer",)
OPENING = "All arithmetic is modulo 10."
NUMBERS = {"+": range(1, 10), "-": range(1, 10), "*": (3, 7, 9)}


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    samples: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on `samples` chains of each number of steps.

    Args:
        steps: numbers of operations, at most 25; 0 asks for a number that stands there.
        samples: chains per number of steps; chain i depends on (steps, i, seed) alone.
        seed: seed of everything.
        batch_tokens: prompt tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `accuracy` at {"steps": k}: the first number of the answer is the variable's. Binomial standard errors,
        Wilson intervals.

    Raises:
        ZooError: no tokenizer, more than 25 steps, or a chain beyond the model's length.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "symbolic")
    running.check_positive("symbolic", samples=samples)
    check_sizes("symbolic", "steps", steps, 0, len(string.ascii_lowercase) - 1)
    records = []
    for count in steps:
        asked = [question(count, i, seed) for i in range(samples)]
        records += ask(model, tokenizer, "symbolic", asked, is_value, batch_tokens=batch_tokens)
    found = summarised(records, by=["steps"])
    return running.build(
        "symbolic", VERSION, model, found, started=started, seed=seed, records=records,
        options={"steps": list(steps), "samples": samples},
        series={"symbolic": curve(found, lambda row: int(row.at["steps"]))},
    )  # fmt: skip


def is_value(output: str, value: str) -> bool:
    """The first number is the value."""
    return first_number(output) == value


def question(steps: int, sample: int, seed: int) -> Question:
    """One chain and its last variable."""
    rng = random.Random(f"symbolic/{steps}/{sample}/{seed}")
    names = rng.sample(string.ascii_lowercase, steps + 1)
    value = rng.randrange(10)
    lines = [OPENING, f"{names[0]} = {value}"]
    for before, name in zip(names, names[1:], strict=False):
        sign = rng.choice("+-*")
        number = rng.choice(NUMBERS[sign])
        value = {"+": value + number, "-": value - number, "*": value * number}[sign] % 10
        lines.append(f"{name} = {before} {sign} {number}")
    return Question("\n".join([*lines, f"{names[-1]} ="]), str(value), {"steps": steps})
