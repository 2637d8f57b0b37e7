"""Passkey retrieval (Landmark Attention, Mohtashami and Jaggi 2023, arXiv:2305.16300).

Example (shortened; the model is asked to continue it, and must produce ` 9054`):

    There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about
    the important information there.
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The grass
    The pass key is 9054. Remember it. 9054 is the pass key.
    The grass is green. The sky is blue.
    What is the pass key? The pass key is

The strings are Landmark Attention's, the keys are uniform from 1 to 50000 as there. The filler is cut between words
where theirs is cut between characters, and the depth is one of a few, so that every cell of
length and depth has its share.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.decoding import answer_tokens, first_number
from zoo.evals.core.questions import DEPTHS, Question, ask, check_depths, fitted
from zoo.evals.core.records import summarised
from zoo.evals.core.result import Result
from zoo.evals.core.statistics import curve

VERSION = 1
NEEDS = ("tokenizer",)
DEFAULT_LENGTHS = (256, 512, 1024, 2048)
SLACK = 4
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[int] = DEPTHS,
    samples: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on `samples` keys per length.

    Args:
        lengths: tokens of prompt and answer together, met to within 1% (default: 256 to 2048 as far as the model goes).
        depths: percent of the filler before the key; sample i is at depth i modulo their number.
        samples: keys per length, over all depths; sample i depends on (length, i, seed) and its depth alone.
        seed: seed of the keys.
        batch_tokens: prompt tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `accuracy` at {"length": L} and at {"length": L, "depth": percent}: the first number of the answer is the
        key. Binomial standard errors, Wilson intervals.

    Raises:
        ZooError: no tokenizer, a depth that is no percent, a length beyond the model's or too short for the prompt.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "passkey")
    running.check_positive("passkey", samples=samples)
    check_depths("passkey", depths)
    lengths = _held(model) if lengths is None else tuple(lengths)
    for length in lengths:
        running.check_length(model, length, "passkey")
    records = []
    for length in lengths:
        asked = [question(tokenizer, length, depths[i % len(depths)], i, seed) for i in range(samples)]
        records += ask(model, tokenizer, "passkey", asked, is_key, slack=SLACK, batch_tokens=batch_tokens)
    by_length = summarised(records, by=["length"])
    return running.build(
        "passkey", VERSION, model, by_length + summarised(records, by=["length", "depth"]), started=started, seed=seed,
        options={"lengths": list(lengths), "depths": list(depths), "samples": samples}, records=records,
        series={"passkey": curve(by_length, lambda row: int(row.at["length"]))},
    )  # fmt: skip


def is_key(output: str, key: str) -> bool:
    """The first number is the key."""
    return first_number(output) == key


def question(tokenizer: Any, length: int, depth: int, sample: int, seed: int) -> Question:
    """One prompt that leaves room for its answer in `length` tokens."""
    key = str(random.Random(f"passkey/{length}/{sample}/{seed}").randint(1, 50_000))
    # every prompt leaves room for the longest answer, so that its length does not depend on the key
    budget = length - answer_tokens(tokenizer, ["50000"], SLACK)
    words = fitted(lambda count: prompt(key, depth, count), tokenizer, budget, "passkey")
    return Question(words, key, {"length": length, "depth": depth})


def prompt(key: str, depth: int, words: int) -> str:
    """The prompt with `words` words of filler."""
    before = words * depth // 100
    return "\n".join([TASK, _filler(before), NEEDLE.format(key=key), _filler(words - before), QUESTION])


def _filler(words: int) -> str:
    return " ".join(islice(cycle(FILLER.split()), words))


def _held(model: Any) -> tuple[int, ...]:
    limit = running.model_limit(model) or max(DEFAULT_LENGTHS)
    held = tuple(length for length in DEFAULT_LENGTHS if length <= limit)
    if not held:
        raise ZooError(f"task 'passkey': the model's {limit} positions hold no default length; pass --lengths")
    return held
