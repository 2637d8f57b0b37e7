"""Selective copying (Gu and Dao 2023, arXiv:2312.00752, appendix E.1), for models trained on it.

Example with `length=8`, `copies=3` (`.` is the blank token, `>` asks for the next token; a label judges the prediction
after its token):

    ids      .  5  .  .  2  .  7  .  >  >  >
    labels                           5  2  7

The last token of the vocabulary asks, the one before is the blank; the others are drawn uniformly and stand at places
drawn uniformly among `length`.
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

VERSION = 1
NEEDS = ()
VOCABULARY = 16
PUBLISHED = 4096  # length of the paper


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    lengths: Sequence[int] = (256,),
    copies: int = 16,
    vocab_size: int | None = None,
    samples: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on rows of each length.

    Args:
        tokenizer: not used.
        lengths: tokens before the first question; the paper's is 4096.
        copies: tokens to remember.
        vocab_size: tokens, blank and question included (default: 16, or the model's if that is less).
        samples: rows per length; row i depends on (length, i, seed, copies, vocab_size) alone.
        seed: seed of everything.
        batch_tokens: tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `accuracy` at {"length": L}: the share of a row's tokens that are given back, mean over rows.

    Raises:
        ZooError: a length that does not hold `copies` tokens or does not fit the model.
    """
    started = time.perf_counter()
    running.check_positive("selective_copy", samples=samples, copies=copies)
    size = vocabulary(model, "selective_copy", VOCABULARY, vocab_size, 4)
    for length in lengths:
        if length < copies:
            raise ZooError(f"task 'selective_copy': length was {length}; it must be at least copies, {copies}")
        running.check_length(model, length + copies, "selective_copy")
    records = []
    for length in lengths:
        made = [row(length, i, seed, copies, size) for i in range(samples)]
        records += ask(model, "selective_copy", made, {"length": length}, batch_tokens)
    options = {"lengths": list(lengths), "copies": copies, "vocab_size": size, "samples": samples}
    return running.build(
        "selective_copy", VERSION, model, summarised(records, by=["length"]),
        started=started, options=options, seed=seed, records=records,
    )  # fmt: skip


def rows(length: int, n: int, seed: int, copies: int = 16, vocab_size: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Ids and labels `[N, length + copies]` of `n` rows, for training."""
    return stacked(lambda sample: row(length, sample, seed, copies, vocab_size), n)


def row(length: int, sample: int, seed: int, copies: int = 16, vocab_size: int = VOCABULARY) -> Labelled:
    """Ids and labels of one row."""
    rng = random.Random(f"selective_copy/{length}/{sample}/{seed}")
    told = [rng.randrange(vocab_size - 2) for _ in range(copies)]
    return scattered(rng, told, length, vocab_size - 2) + [vocab_size - 1] * copies, [IGNORE] * length + told


def scattered(rng: random.Random, told: Sequence[int], length: int, blank: int) -> list[int]:
    """`told` in its order at random places among `length - len(told)` blanks."""
    ids = [blank] * length
    for place, token in zip(sorted(rng.sample(range(length), len(told))), told, strict=True):
        ids[place] = token
    return ids
