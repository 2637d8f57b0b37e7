"""Attention sinks (Xiao et al. 2023, arXiv 2309.17453): how much of its attention each head gives to the first tokens.

Example: a head of which every late query puts 0.7 on the first token and spreads 0.3 over the rest has a mass of 0.7 on
one token; a head that attends evenly has, at query i, a mass of 1 / (i + 1).
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.attended import attended, softmax_mixers
from zoo.evals.core.layers import Place, at, sample_rows
from zoo.evals.core.result import Result
from zoo.evals.core.statistics import mean_row

VERSION = 1
NEEDS = ()
QUERIES = 64


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    data: str | Path | None = None,
    length: int = 256,
    samples: int = 2,
    first: int = 4,
    seed: int = 0,
) -> Result:
    """Attention mass on the first tokens, by layer and head, of at most 64 queries in the second half of each row.

    Args:
        data: a .txt, .md or .xz file (default: random tokens).
        length: tokens per row.
        samples: rows.
        first: how many tokens count as the first ones, beside the very first.
        seed: seed of random tokens.

    Returns:
        Rows `sink_mass` at {"layer": l, "head": h, "tokens": 1} and {..., "tokens": first}; standard errors over
        samples; and `even_mass` at {"tokens": n}, that of an even head.

    Raises:
        ZooError: no softmax attention, a length beyond the model's or too short, or unusable data.
    """
    started = time.perf_counter()
    task = "attention_sinks"
    running.check_positive(task, first=first)
    if length < 2 * first:
        raise ZooError(f"task {task!r}: length was {length}; it must be at least {2 * first}, twice the first tokens")
    found = softmax_mixers(model, task)
    ids, _ = sample_rows(model, tokenizer, data, length, samples, seed, task)
    queries = range(length // 2, length, max(1, length // 2 // QUERIES))
    counts = sorted({1, first})
    masses: dict[tuple[Place, int, int], list[float]] = defaultdict(list)
    for row in running.track(ids, task, len(ids)):
        sums: dict[tuple[Place, int, int], float] = defaultdict(float)
        for place, head, _, weights in attended(model, found, row, queries):
            for count in counts:
                sums[place, head, count] += float(weights[:, :count].sum())
        for key, total in sums.items():
            masses[key].append(total / len(queries))
    rows = [mean_row("sink_mass", x, at(place, head=head, tokens=n)) for (place, head, n), x in masses.items()]
    even = {count: [count / (query + 1) for query in queries] for count in counts}
    rows += [mean_row("even_mass", [sum(x) / len(x)], {"tokens": count}) for count, x in even.items()]
    options = {"data": None if data is None else str(data), "length": length, "samples": len(ids), "first": first}
    return running.build(task, VERSION, model, rows, started=started, options=options, seed=seed)
