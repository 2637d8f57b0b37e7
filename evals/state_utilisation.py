"""State utilisation (Parnichkun et al. 2025, arXiv 2504.19561): effective state size over the size of the state kept.

Example: a recurrent head whose state has 16 rows and whose effective size is 4 uses 0.25 of it. The state of softmax
attention at token i has i rows.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from zoo.architectures.core.mixing import TOLERANCE
from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.layers import at, sample_rows
from zoo.evals.core.result import Result, Row
from zoo.evals.core.states import check_tolerance, effective, theoretical
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
    """Effective over theoretical state size of every layer of `model`.

    Args:
        data, length, samples, tolerance, seed: as those of `effective_state_size`.

    Returns:
        Rows `utilisation` (tolerance variant) and `entropy_utilisation` at {"layer": l}: mean over heads and tokens;
        standard errors over samples. `state_rows`, the rows of a head's state at the last measured token. `skipped`
        counts mixers that have no matrix or keep no state.

    Raises:
        ZooError: as those of `effective_state_size`.
    """
    started = time.perf_counter()
    task = "state_utilisation"
    check_tolerance(task, tolerance)
    ids, _ = sample_rows(model, tokenizer, data, length, samples, seed, task)
    sizes, without = effective(model, ids, tolerance, task)
    kept = {place: by for place, by in theoretical(model, ids, sizes["tolerance"]).items() if all(by.values())}
    if not kept:
        raise ZooError(f"task {task!r}: no layer of the model has both a mixing matrix and a state")
    rows: list[Row] = []
    for place, states in kept.items():
        rows.append(Row("state_rows", states[max(states)], at=at(place)))
        for name, metric in (("tolerance", "utilisation"), ("entropy", "entropy_utilisation")):
            shares = torch.stack([sizes[name][place][token] / size for token, size in states.items()])
            rows.append(mean_row(metric, shares.mean((0, 2)).tolist(), at(place)))
    options: dict[str, Any] = {"data": None if data is None else str(data), "length": length, "samples": len(ids)}
    options |= {"tolerance": tolerance}
    skipped = len(without) + len(sizes["tolerance"]) - len(kept)
    return running.build(task, VERSION, model, rows, started=started, options=options, seed=seed, skipped=skipped)
