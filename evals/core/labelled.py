"""Tasks made of tokens, without text: rows of ids and, where something is asked, the token that is right.

A label stands at the place whose next-token prediction it judges; `IGNORE` stands where nothing is asked. The same rows
train a model (`stacked`) and test it (`ask`).

N rows, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.records import Record
from zoo.evals.core.requests import Predict, outputs
from zoo.evals.core.result import Row
from zoo.evals.core.statistics import Z95

IGNORE = -100
SHOWN = 256
_RESAMPLES = 400
Labelled = tuple[list[int], list[int]]


def stacked(row: Callable[[int], Labelled], n: int) -> tuple[Tensor, Tensor]:
    """Ids and labels `[N, L]` of `row(0)` to `row(n - 1)`."""
    ids, labels = zip(*map(row, range(n)), strict=True)
    return torch.tensor(ids), torch.tensor(labels)


def vocabulary(model: Any, task: str, published: int, wanted: int | None, least: int) -> int:
    """How many tokens a task draws from: `wanted`, by default the published number or the model's if that is less.

    Raises:
        ZooError: it is more than the model's or less than `least`.
    """
    held = running.vocab_size(model)
    size = min(published, held) if wanted is None else wanted
    if not least <= size <= held:
        raise ZooError(f"task {task!r}: vocab_size was {size}; it must be between {least} and the model's {held}")
    return size


def ask(
    model: Any,
    task: str,
    rows: Sequence[Labelled],
    at: Mapping[str, int | str],
    batch_tokens: int | None = None,
) -> list[Record]:
    """One record per row: `accuracy`, the share of its labels that the model predicts.

    Raises:
        ZooError: the rows are longer than the model allows.
    """
    running.check_length(model, max(len(ids) for ids, _ in rows), task)
    asked = [[i for i, label in enumerate(labels) if label != IGNORE] for _, labels in rows]
    requests = [Predict(ids, places) for (ids, _), places in zip(rows, asked, strict=True)]
    place = "/".join(map(str, at.values()))
    found = outputs(model, requests, batch_tokens=batch_tokens, label=f"{task} {place}")
    return [
        _record(f"{place}/{i}", at, ids, [labels[p] for p in places], output)
        for i, ((ids, labels), places, output) in enumerate(zip(rows, asked, found, strict=True))
    ]


def _record(name: str, at: Mapping[str, int | str], ids: list[int], right: list[int], output: list[int]) -> Record:
    hits = sum(got == label for got, label in zip(output, right, strict=True))
    shown = " ".join(map(str, ids[-SHOWN:]))
    return Record(name, {"accuracy": hits / len(right)}, at, shown, output, right, len(ids))


def macro_accuracy(records: Sequence[Record], at: Mapping[str, int | str]) -> Row:
    """MAD's accuracy: the mean over tokens of the share of a token's labels that were predicted.

    A token that was predicted and never right counts as 0, as in torchmetrics' multiclass accuracy with its default
    average. Standard error and interval are of a bootstrap over rows.
    """
    pairs = [torch.tensor([list(record.answers), list(record.output)]) for record in records]
    size = int(max(pair.max() for pair in pairs)) + 1
    labels = torch.stack([torch.bincount(right, minlength=size) for right, _ in pairs]).double()
    guesses = torch.stack([torch.bincount(got, minlength=size) for _, got in pairs]).double()
    hits = torch.stack([torch.bincount(right[right == got], minlength=size) for right, got in pairs]).double()
    draws = torch.randint(len(pairs), (_RESAMPLES, len(pairs)), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(_RESAMPLES, len(pairs), dtype=torch.double)
    weights.scatter_add_(1, draws, torch.ones_like(weights))
    weights = torch.cat([torch.ones(1, len(pairs), dtype=torch.double), weights])
    found, known = weights @ hits, weights @ labels
    seen = (known + weights @ guesses) > 0
    means = (found / known.clamp(min=1)).sum(1) / seen.sum(1)
    value, error = means[0].item(), means[1:].std().item()
    interval = (max(0.0, value - Z95 * error), min(1.0, value + Z95 * error))
    return Row("macro_accuracy", value, n=len(pairs), stderr=error, ci95=interval, at=dict(at))
