"""Perplexity on a text file, and by position in the window.

Example: with `length=4` the tokens `a b c d e f g h i` make two windows. The model reads `a b c d` and is scored on
`b c d e`, then reads `e f g h` and is scored on `f g h i`. With a tokenizer that adds a BOS token the windows are
`<s> a b c` scored on `a b c d`, and so on. State and cache start empty at every window.

V vocabulary, L window length, N windows.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.evals.core import running
from zoo.evals.core.requests import LogLikelihood, outputs
from zoo.evals.core.result import Result, Row
from zoo.evals.core.statistics import centre, curve, exponential, mean_row
from zoo.evals.core.text import buckets, read_text
from zoo.evals.core.text import windows as cut

VERSION = 1
NEEDS = ("tokenizer", "data")


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    data: str | Path | None = None,
    length: int | None = None,
    windows: int | None = None,
) -> Result:
    """Perplexity of `model` on the text in `data`.

    Args:
        data: a .txt, .md or .xz file.
        length: scored tokens per window (default: 2048, or the model's limit if that is less).
        windows: at most this many windows, from the start of the text (default: all).

    Returns:
        Rows `nll` (nats per token), `perplexity`, `bits_per_byte`, `tokens`, and by position bucket
        `position_perplexity` at {"position": start, "end": end}. Standard errors are over windows.

    Raises:
        ZooError: no tokenizer, no usable data, text shorter than one window, or a length beyond the model's.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "perplexity")
    running.check_positive("perplexity", windows=windows)
    length = min(2048, running.model_limit(model) or 2048) if length is None else length
    running.check_length(model, length, "perplexity")
    cuts = cut(read_text(data, "perplexity"), tokenizer, length, windows)
    nll = window_nll(model, cuts.rows)
    rows = _summary(nll, cuts.n_bytes)
    by_position = [_bucket(nll, start, end) for start, end in buckets(length)]
    options = {"data": str(data), "length": length, "windows": len(nll)}
    return running.build(
        "perplexity",
        VERSION,
        model,
        rows + by_position,
        started=started,
        options=options,
        skipped=cuts.skipped,
        series={"perplexity_by_position": curve(by_position, centre)},
    )


def window_nll(model: Any, rows: Tensor) -> Tensor:
    """Negative log-likelihood `[N, L]` in nats of `rows[:, 1:]` (`rows [N, L + 1]`), on the CPU in fp64."""
    found = outputs(model, [LogLikelihood(ids) for ids in rows.tolist()], label="perplexity")
    return -torch.tensor([output["logprobs"] for output in found], dtype=torch.float64)


def _summary(nll: Tensor, n_bytes: int) -> list[Row]:
    row = mean_row("nll", nll.mean(1).tolist())
    bits = nll.sum().item() / math.log(2) / n_bytes
    return [row, exponential("perplexity", row), Row("bits_per_byte", bits), Row("tokens", nll.numel())]


def _bucket(nll: Tensor, start: int, end: int) -> Row:
    at: dict[str, int | str] = {"position": start, "end": end}
    return exponential("position_perplexity", mean_row("nll", nll[:, start:end].mean(1).tolist(), at))
