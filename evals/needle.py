"""Recall of one number hidden in a long text: RULER's niah_single_2 form over a text of the user's.

Example (shortened; the model is asked to continue it, and must produce ` 4081223`):

    A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the
    number afterwards.
    It was a dark night. One of the special magic numbers for quaint-walnut is: 4081223. The wind had risen.
    What is the special magic number for quaint-walnut mentioned in the provided text? The special magic number for
    quaint-walnut mentioned in the provided text is

Keys are adjective-noun pairs held out from the recall documents that the bundled teachers are trained on; values are
7-digit numbers; the depth is one of RULER's 40, drawn per sample. Where RULER leaves room for 128 new tokens, this
leaves the tokens of a value and 8 more, and stops once the value stands in the answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.decoding import Continue, answer_tokens, answers, contains, first_number
from zoo.evals.core.haystack import Haystack, Question
from zoo.evals.core.records import Record, summarised
from zoo.evals.core.result import Result
from zoo.evals.core.statistics import curve
from zoo.evals.core.text import read_text
from zoo.evals.core.words import keys

VERSION = 1
NEEDS = ("tokenizer", "data")
DEFAULT_LENGTHS = (256, 512, 1024, 2048)
SLACK = 8


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    data: str | Path | None = None,
    lengths: Sequence[int] | None = None,
    samples: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on `samples` needles per length.

    Args:
        data: the haystack, a .txt, .md or .xz file.
        lengths: tokens of prompt and answer together, met to within 1% (default: 256 to 2048 as far as the model goes).
        samples: questions per length.
        seed: seed of keys, values, depths and places in the text.
        batch_tokens: prompt tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows at {"length": L}: `accuracy`, the value is a substring of the answer (RULER's score); `first_number`, it
        is the answer's first number. Binomial standard errors, Wilson intervals.

    Raises:
        ZooError: no tokenizer, no usable data, a length beyond the model's or too short for the prompt.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "needle")
    running.check_positive("needle", samples=samples)
    lengths = default_lengths(model) if lengths is None else tuple(lengths)
    for length in lengths:
        running.check_length(model, length, "needle")
    haystack = Haystack(read_text(data, "needle"), tokenizer)
    sets = {length: haystack.questions(keys(), length, samples, seed) for length in lengths}
    max_new = answer_tokens(tokenizer, [q.value for qs in sets.values() for q in qs], SLACK)
    records = [
        record
        for length, questions in sets.items()
        for record in _ask(model, tokenizer, haystack, questions, length, max_new, batch_tokens)
    ]
    rows = summarised(records, by=["length"])
    options = {"data": str(data), "lengths": list(lengths), "samples": samples, "max_new": max_new}
    series = {"needle": curve([row for row in rows if row.metric == "accuracy"], lambda row: int(row.at["length"]))}
    return running.build(
        "needle", VERSION, model, rows, started=started, options=options, seed=seed, series=series, records=records
    )


def default_lengths(model: Any) -> tuple[int, ...]:
    """Those of `DEFAULT_LENGTHS` that the model holds.

    Raises:
        ZooError: it holds none.
    """
    limit = running.model_limit(model) or max(DEFAULT_LENGTHS)
    held = tuple(length for length in DEFAULT_LENGTHS if length <= limit)
    if not held:
        raise ZooError(f"the model's {limit} positions hold no default needle length; pass lengths of at most {limit}")
    return held


def _ask(
    model: Any,
    tokenizer: Any,
    haystack: Haystack,
    questions: Sequence[Question],
    length: int,
    max_new: int,
    batch_tokens: int | None,
) -> list[Record]:
    prompts = haystack.prompts(questions, length - max_new)
    requests = [Continue(ids, max_new, (q.value,)) for ids, q in zip(prompts, questions, strict=True)]
    texts = answers(model, tokenizer, requests, batch_tokens=batch_tokens, label=f"needle {length}")
    return [
        Record(
            id=f"{length}/{i}",
            scores={"accuracy": contains(text, q.value), "first_number": first_number(text) == q.value},
            at={"length": length, "depth": q.depth},
            prompt=tokenizer.decode(ids),
            output=text,
            answers=(q.value,),
            tokens=len(ids),
        )
        for i, (ids, q, text) in enumerate(zip(prompts, questions, texts, strict=True))
    ]
