"""Induction heads (Gu and Dao 2023, arXiv:2312.00752, after Olsson et al. 2022), for models trained on it.

Example with `length=8` (`!` is the trigger; a label judges the prediction after its token):

    ids      3  1  !  6  0  2  5  !
    labels                        6

The trigger is the last token of the vocabulary; the others are drawn uniformly. It stands at a place drawn uniformly
and at the end; the token after the first one is asked for. The paper trains at length 256 and tests from 64 to 2**20.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.labelled import IGNORE, Labelled, ask, stacked, vocabulary
from zoo.evals.core.records import summarised
from zoo.evals.core.result import Result
from zoo.evals.core.statistics import curve

VERSION = 1
NEEDS = ()
VOCABULARY = 16


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    lengths: Sequence[int] = (64, 128, 256),
    vocab_size: int | None = None,
    samples: int = 50,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on rows of each length.

    Args:
        tokenizer: not used.
        lengths: tokens of a row, the second trigger included.
        vocab_size: tokens, the trigger included (default: 16, or the model's if that is less).
        samples: rows per length; row i depends on (length, i, seed, vocab_size) alone.
        seed: seed of everything.
        batch_tokens: tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `accuracy` at {"length": L}.

    Raises:
        ZooError: a length of less than 3 tokens or beyond the model's.
    """
    started = time.perf_counter()
    running.check_positive("induction_heads", samples=samples)
    size = vocabulary(model, "induction_heads", VOCABULARY, vocab_size, 3)
    for length in lengths:
        if length < 3:
            raise ZooError(f"task 'induction_heads': length was {length}; it must be at least 3")
        running.check_length(model, length, "induction_heads")
    records = []
    for length in lengths:
        made = [row(length, i, seed, size) for i in range(samples)]
        records += ask(model, "induction_heads", made, {"length": length}, batch_tokens)
    found = summarised(records, by=["length"])
    return running.build(
        "induction_heads", VERSION, model, found, started=started, seed=seed, records=records,
        options={"lengths": list(lengths), "vocab_size": size, "samples": samples},
        series={"induction_heads": curve(found, lambda row: int(row.at["length"]))},
    )  # fmt: skip


def rows(length: int, n: int, seed: int, vocab_size: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Ids and labels `[N, L]` of `n` rows, for training."""
    return stacked(lambda sample: row(length, sample, seed, vocab_size), n)


def row(length: int, sample: int, seed: int, vocab_size: int = VOCABULARY) -> Labelled:
    """Ids and labels of one row."""
    rng = random.Random(f"induction_heads/{length}/{sample}/{seed}")
    trigger = vocab_size - 1
    ids = [rng.randrange(trigger) for _ in range(length)]
    first = rng.randrange(length - 2)
    ids[first] = ids[-1] = trigger
    return ids, [IGNORE] * (length - 1) + [ids[first + 1]]
