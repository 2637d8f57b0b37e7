"""Effective state size (Parnichkun et al. 2025, arXiv 2504.19561): how large a recurrent state is that computes what a
head does on sample text.

Example: a head of linear attention with keys of 8 numbers, over 64 tokens, has 4, 8 and 4 at tokens 4, 32 and 60; a
softmax head 4, 32 and 4; one with a window of 9 tokens at most 8.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.mixing import TOLERANCE
from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.layers import at, sample_rows
from zoo.evals.core.result import Result, Row
from zoo.evals.core.states import check_tolerance, effective
from zoo.evals.core.statistics import mean_row

VERSION = 1
NEEDS = ()


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    data: str | Path | None = None,
    length: int = 64,
    samples: int = 2,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Result:
    """Effective state sizes of every head of `model` that mixes values by a matrix.

    Args:
        data: a .txt, .md or .xz file (default: random tokens).
        length: tokens per row; the size is measured at 8 of them and averaged.
        samples: rows.
        tolerance: share of the largest singular value that still counts.
        seed: seed of random tokens.

    Returns:
        Rows `tolerance_size` and `entropy_size` at {"layer": l, "head": h} (and "part", of a mixer inside a mixer), and
        `total_tolerance_size` and `total_entropy_size`, summed over heads, at {"layer": l} and of the model. Standard
        errors are over samples. `skipped` counts mixers that have no such matrix.

    Raises:
        ZooError: not a model of the zoo, no layer with a matrix, a length beyond the model's, or unusable data.
    """
    started = time.perf_counter()
    task = "effective_state_size"
    check_tolerance(task, tolerance)
    ids, _ = sample_rows(model, tokenizer, data, length, samples, seed, task)
    sizes, without = effective(model, ids, tolerance, task)
    if not sizes["tolerance"]:
        raise ZooError(f"task {task!r}: no layer of the model mixes values by a matrix to measure")
    rows: list[Row] = []
    for name, by in sizes.items():
        totals: list[Tensor] = []
        for place, found in by.items():
            mean = torch.stack(list(found.values())).mean(0)  # [N, H]
            rows += [mean_row(f"{name}_size", x.tolist(), at(place, head=h)) for h, x in enumerate(mean.unbind(1))]
            rows.append(mean_row(f"total_{name}_size", mean.sum(1).tolist(), at(place)))
            totals.append(mean.sum(1))
        rows.append(mean_row(f"total_{name}_size", torch.stack(totals).sum(0).tolist()))
    options: dict[str, Any] = {"data": None if data is None else str(data), "length": length, "samples": len(ids)}
    options |= {"tolerance": tolerance, "without_matrix": [f"{layer} {part}".strip() for layer, part in without]}
    return running.build(task, VERSION, model, rows, started=started, options=options, seed=seed, skipped=len(without))
