"""Continuations that a model rates: tokens as lm-evaluation-harness cuts them, and its accuracies of multiple choice.

Source: EleutherAI/lm-evaluation-harness (MIT), `TemplateLM` and the `multiple_choice` output type. For choices c with
summed log-probabilities ll(c), `acc` is argmax ll(c) = gold, `acc_norm` argmax ll(c) / characters(c) = gold and
`acc_bytes` argmax ll(c) / bytes(c) = gold; the first of equals wins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.records import Record, summarised
from zoo.evals.core.requests import LogLikelihood, outputs
from zoo.evals.core.result import Result
from zoo.evals.core.text import bos_ids, encode

_SHOWN = 4096
Pair = tuple[str, str]
WEIGHTS: dict[str, Callable[[str], int]] = {
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        pairs: (context, continuation) of each choice.
        choices: text of each choice, whose length normalises.
        gold: index of the right one.
    """

    pairs: Sequence[Pair]
    choices: Sequence[str]
    gold: int


def likelihood_requests(tokenizer: Any, pairs: Sequence[Pair], task: str) -> list[LogLikelihood]:
    """A request per (context, continuation). White space at the end of a context goes to the continuation; the context
    and the whole are each encoded, and the tokens after as many as the context has are scored. An empty context is the
    tokenizer's BOS, else EOS.

    Raises:
        ZooError: a continuation without tokens of its own, or an empty context and no token to stand for it.
    """
    bos = bos_ids(tokenizer)
    return [_request(tokenizer, bos, context, continuation, task) for context, continuation in pairs]


def _request(tokenizer: Any, bos: list[int], context: str, continuation: str, task: str) -> LogLikelihood:
    kept = context.rstrip()
    ids = bos + encode(tokenizer, context + continuation)
    start = len(bos) + len(encode(tokenizer, kept)) if kept else 1
    if not kept:
        prefix = _prefix(tokenizer, task)
        ids = ids if ids[:1] == [prefix] else [prefix, *ids]
    if start >= len(ids):
        raise ZooError(f"task {task!r}: {continuation!r} after {context[-40:]!r} has no tokens of its own to score")
    return LogLikelihood(ids, start)


def _prefix(tokenizer: Any, task: str) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        if (found := getattr(tokenizer, name, None)) is not None:
            return int(found)
    raise ZooError(f"task {task!r} has an empty context and the tokenizer neither BOS nor EOS; give it one of them")


def fitting(model: Any, groups: Sequence[Sequence[LogLikelihood]], task: str) -> list[int]:
    """Indices of the groups whose requests all fit the model; none is cut.

    Raises:
        ZooError: there is none.
    """
    limit = running.model_limit(model)
    longest = [max(len(request.ids) - 1 for request in group) for group in groups]
    found = [i for i, length in enumerate(longest) if limit is None or length <= limit]
    if not found:
        raise ZooError(f"task {task!r}: no example fits the model's {limit} positions; the shortest has {min(longest)}")
    return found


def evaluate_choices(
    task: str,
    version: int,
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    metrics: Sequence[str],
    samples: int | None,
    options: Mapping[str, Any],
    batch_tokens: int | None = None,
    comparable_to: str = "",
) -> Result:
    """The result of a multiple-choice task: rows `metrics`, a record per question.

    Raises:
        ZooError: no tokenizer, `samples` below 1, or no question that fits the model.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, task)
    running.check_positive(task, samples=samples)
    items = items[:samples]
    groups = [likelihood_requests(tokenizer, item.pairs, task) for item in items]
    chosen = fitting(model, groups, task)
    asked = [request for i in chosen for request in groups[i]]
    found = iter(outputs(model, asked, batch_tokens=batch_tokens, label=task))
    records = [
        _record(i, items[i], metrics, [math.fsum(next(found)["logprobs"]) for _ in groups[i]], groups[i])
        for i in chosen
    ]
    return running.build(
        task,
        version,
        model,
        summarised(records),
        started=started,
        options={**options, "samples": samples},
        skipped=len(items) - len(chosen),
        comparable_to=comparable_to,
        records=records,
    )


def accuracies(item: Item, likelihoods: Sequence[float], metrics: Sequence[str]) -> dict[str, bool]:
    """Whether the likeliest choice is the right one, by metric; lengths are in characters or bytes."""
    found = {}
    for metric in metrics:
        rated = [ll / WEIGHTS[metric](choice) for ll, choice in zip(likelihoods, item.choices, strict=True)]
        found[metric] = rated.index(max(rated)) == item.gold
    return found


def _record(
    i: int, item: Item, metrics: Sequence[str], likelihoods: list[float], requests: Sequence[LogLikelihood]
) -> Record:
    best = likelihoods.index(max(likelihoods))
    return Record(
        id=str(i),
        scores=accuracies(item, likelihoods, metrics),
        prompt=item.pairs[best][0][-_SHOWN:],
        output=item.choices[best],
        answers=(item.choices[item.gold],),
        tokens=sum(len(request.ids) for request in requests),
    )
