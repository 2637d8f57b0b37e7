"""Phone book lookup (Repeat After Me, Jelassi et al. 2024, arXiv:2402.01032).

Example with `entries=4` (the model is asked to continue it, and must produce ` 7730154826`):

    Clara Doyle: 6204417795
    Hugo Barnes: 7730154826
    Rita Palmer: 9981230047
    Keith Shaw: 8140665213

    Keith Shaw: 8140665213
    Clara Doyle: 6204417795

    Hugo Barnes:

Two entries of the book are repeated before the question, which shows a model without instructions what is wanted. The
format is the paper's: ten digits, of which the first is 6 to 9. Names are of a list of our own, and none comes twice.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

from zoo.evals.core import running
from zoo.evals.core.names import names
from zoo.evals.core.questions import Question, ask, check_sizes
from zoo.evals.core.records import summarised
from zoo.evals.core.result import Result

VERSION = 1
NEEDS = ("tokenizer",)
SHOTS = 2
_names = cache(names)


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    entries: Sequence[int] = (10, 40),
    samples: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on `samples` books of each size.

    Args:
        entries: numbers of entries in a book.
        samples: books per size; book i depends on (size, i, seed) alone.
        seed: seed of names, numbers and questions.
        batch_tokens: prompt tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `accuracy` at {"entries": n}: the answer's first line is the number. Binomial standard errors, Wilson
        intervals.

    Raises:
        ZooError: no tokenizer, fewer than 3 entries or more than there are names, or a book beyond the model's length.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "phonebook")
    running.check_positive("phonebook", samples=samples)
    check_sizes("phonebook", "entries", entries, SHOTS + 1, len(_names()))
    records = []
    for size in entries:
        asked = [question(size, i, seed) for i in range(samples)]
        records += ask(model, tokenizer, "phonebook", asked, is_number, stop=("\n",), batch_tokens=batch_tokens)
    return running.build(
        "phonebook", VERSION, model, summarised(records, by=["entries"]), started=started, seed=seed,
        options={"entries": list(entries), "samples": samples}, records=records,
    )  # fmt: skip


def is_number(output: str, number: str) -> bool:
    """The line is the number."""
    return output.strip() == number


def question(entries: int, sample: int, seed: int) -> Question:
    """One book and the name that is asked for."""
    rng = random.Random(f"phonebook/{entries}/{sample}/{seed}")
    chosen = rng.sample(_names(), entries)
    numbers = [f"{rng.randint(6, 9)}{rng.randrange(10**9):09}" for _ in chosen]
    lines = [f"{name}: {number}" for name, number in zip(chosen, numbers, strict=True)]
    *shown, asked = rng.sample(range(entries), SHOTS + 1)
    text = "\n".join([*lines, "", *(lines[i] for i in shown), "", f"{chosen[asked]}:"])
    return Question(text, numbers[asked], {"entries": entries})
