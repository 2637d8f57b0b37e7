"""Recall of one entry of a list of key-value pairs.

Example with `pairs=3` (the model is asked to continue it, and must produce ` 7730154`):

    quaint-walnut: 4081223
    sturdy-falcon: 7730154
    tepid-orchid: 1190027

    sturdy-falcon:

With `form="repeat"` the list stands between "Here is a list of keys and values." and "Now repeat the values of these
keys.", as in the documents that taught books-llama-22m. With `form="needles"` the same pairs are RULER's
niah_multikey_2: lines "One of the special magic numbers for sturdy-falcon is: 7730154." between RULER's introduction
and question.

Keys are adjective-noun pairs held out from the recall documents that the bundled teachers are trained on; values are
7-digit numbers; the asked pair is drawn uniformly. There is one question per list, so that samples are independent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.decoding import Continue, answer_tokens, answers
from zoo.evals.core.haystack import ANSWER_PREFIX, NEEDLE, TASK
from zoo.evals.core.records import Record, summarised
from zoo.evals.core.result import Result
from zoo.evals.core.text import bos_ids, encode
from zoo.evals.core.words import keys

VERSION = 1
NEEDS = ("tokenizer",)
SLACK = 2


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    pairs: Sequence[int] = (30,),
    samples: int = 20,
    seed: int = 0,
    form: str = "list",
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on `samples` lists of each size.

    Args:
        pairs: numbers of pairs in a list.
        samples: lists per size; list i depends on (size, i, seed) alone.
        seed: seed of keys, values and questions.
        form: "list", "repeat" or "needles", how the pairs are written.
        batch_tokens: prompt tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `accuracy` at {"pairs": n}: the answer starts with the value. Binomial standard errors, Wilson intervals.

    Raises:
        ZooError: no tokenizer, an unknown form, more pairs than there are keys, or a list beyond the model's length.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "key_value")
    running.check_positive("key_value", samples=samples)
    if form not in FORMS:
        raise ZooError(f"task 'key_value': form {form!r} is unknown; choose one of: {', '.join(FORMS)}")
    for size in pairs:
        if not 1 <= size <= len(keys()):
            raise ZooError(f"task 'key_value': pairs was {size}; it must be between 1 and {len(keys())}")
    records = [record for size in pairs for record in _ask(model, tokenizer, size, samples, seed, form, batch_tokens)]
    rows = summarised(records, by=["pairs"])
    options = {"pairs": list(pairs), "samples": samples, "form": form}
    return running.build(
        "key_value", VERSION, model, rows, started=started, options=options, seed=seed, records=records
    )


def prompt(pairs: int, sample: int, seed: int, form: str = "list") -> tuple[str, str]:
    """The list and question of one sample, and the value that answers it."""
    rng = random.Random(f"key_value/{pairs}/{sample}/{seed}")
    chosen = rng.sample(keys(), pairs)
    values = [str(rng.randint(1_000_000, 9_999_999)) for _ in chosen]
    asked = rng.randrange(pairs)
    return FORMS[form](list(zip(chosen, values, strict=True)), chosen[asked]), values[asked]


def _list(entries: Sequence[tuple[str, str]], key: str) -> str:
    return "\n".join([*(f"{name}: {value}" for name, value in entries), "", f"{key}:"])


def _repeat(entries: Sequence[tuple[str, str]], key: str) -> str:
    lines = [f"{name}: {value}" for name, value in entries]
    opening, question = "Here is a list of keys and values.", "Now repeat the values of these keys."
    return "\n".join([opening, *lines, question, f"{key}:"])


def _needles(entries: Sequence[tuple[str, str]], key: str) -> str:
    context = "\n".join(NEEDLE.format(key=name, value=value) for name, value in entries)
    return TASK.format(context=context, key=key) + ANSWER_PREFIX.format(key=key)


FORMS: dict[str, Callable[[Sequence[tuple[str, str]], str], str]] = {
    "list": _list,
    "repeat": _repeat,
    "needles": _needles,
}


def _ask(
    model: Any, tokenizer: Any, pairs: int, samples: int, seed: int, form: str, batch_tokens: int | None
) -> list[Record]:
    texts, values = zip(*(prompt(pairs, sample, seed, form) for sample in range(samples)), strict=True)
    bos = bos_ids(tokenizer)
    prompts = [bos + encode(tokenizer, text) for text in texts]
    max_new = answer_tokens(tokenizer, values, SLACK)
    running.check_length(model, max(map(len, prompts)) + max_new, "key_value")
    requests = [Continue(ids, max_new, (value,)) for ids, value in zip(prompts, values, strict=True)]
    found = answers(model, tokenizer, requests, batch_tokens=batch_tokens, label=f"key_value {pairs}")
    return [
        Record(
            id=f"{pairs}/{i}",
            scores={"accuracy": output.strip().startswith(value)},
            at={"pairs": pairs},
            prompt=text,
            output=output,
            answers=(value,),
            tokens=len(ids),
        )
        for i, (text, ids, value, output) in enumerate(zip(texts, prompts, values, found, strict=True))
    ]
