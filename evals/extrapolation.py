"""Perplexity at lengths beyond the one a model was trained at, and with its state carried from window to window.

Example for a model of 4 positions with `lengths=[4, 8]`: the tokens `a b c d e f g h i` are read as two windows of 4,
`a b c d` scored on `b c d e` and `e f g h` scored on `f g h i`, each from an empty state, and as one window of 8. The
second half of the window of 8 is the second window of 4 with the state carried into it.

A window is read in pieces with the cache between them, so that its length is not bounded by the memory of one call.

L window length, N windows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.requests import Request, outputs
from zoo.evals.core.result import Result, Row
from zoo.evals.core.statistics import centre, curve, exponential, mean_row
from zoo.evals.core.text import buckets, read_text
from zoo.evals.core.text import windows as cut

VERSION = 1
NEEDS = ("tokenizer", "data")
MULTIPLES = (0.5, 1, 2, 4)
PIECE = 2048


@dataclass(frozen=True)
class Stream(Request):
    """The log-probability of each of `ids[1:]`, read `piece` tokens at a time; its output is a list of nats."""

    piece: int = PIECE
    kind: ClassVar[str] = "stream"

    @property
    def group(self) -> Any:
        return len(self.ids), self.piece


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    data: str | Path | None = None,
    lengths: Sequence[int] | None = None,
    beyond: bool = False,
    windows: int = 1,
    piece: int = PIECE,
    batch_tokens: int | None = None,
) -> Result:
    """Perplexity of `model` on the same text cut into windows of each length.

    Args:
        data: a .txt, .md or .xz file.
        lengths: scored tokens per window (default: 0.5, 1, 2 and 4 times the model's limit; those beyond it only with
            `beyond`).
        beyond: allow lengths beyond the model's limit, which rotary or no positions can take.
        windows: how many windows of the greatest length to read, from the start of the text.
        piece: tokens per call; it changes the memory, not the scores.
        batch_tokens: tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `nll` and `perplexity` at {"length": L} and `position_perplexity` at {"length": L, "position": start,
        "end": end}, state empty at the start of each window; and over the stretches of the greatest window,
        `window_perplexity` at {"state": "reset" or "carried", "position": start, "end": end}: read as windows of their
        own, or with the state of everything before. The stretches are as long as the model's limit (or as the shortest
        length, where none is stated). Standard errors are over windows.

    Raises:
        ZooError: no tokenizer, no usable data, text shorter than the greatest window, a length beyond the model's limit
            without `beyond`, or with it for a model of learned positions.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "extrapolation")
    running.check_positive("extrapolation", windows=windows, piece=piece)
    lengths = sorted(set(_lengths(model, lengths, beyond)))
    text = read_text(data, "extrapolation")
    whole = cut(text, tokenizer, lengths[-1], windows)
    total = whole.rows.shape[0] * lengths[-1]
    rows: list[Row] = []
    series = {}
    nll = {}
    for length in lengths:
        cuts = cut(text, tokenizer, length, total // length)
        nll[length] = stream_nll(model, cuts.rows, piece, batch_tokens)
        rows += _summary(nll[length], length)
        series[f"perplexity_at_{length}"] = curve(
            [r for r in rows if r.at.get("length") == length and r.at.get("end")], centre
        )
    carried = _carried(nll, min(lengths[-1], running.model_limit(model) or lengths[0]))
    series |= {f"state_{state}": curve(found, centre) for state, found in carried.items()}
    options = {"data": str(data), "lengths": lengths, "beyond": beyond, "windows": windows, "tokens": total}
    return running.build(
        "extrapolation", VERSION, model, [*rows, *(row for found in carried.values() for row in found)],
        started=started, options={**options, "piece": piece}, skipped=whole.skipped, series=series,
    )  # fmt: skip


def stream_nll(model: Any, rows: Tensor, piece: int, batch_tokens: int | None = None) -> Tensor:
    """Negative log-likelihood `[N, L]` in nats of `rows[:, 1:]` (`rows [N, L + 1]`), on the CPU in fp64."""
    requests = [Stream(ids, piece) for ids in rows.tolist()]
    found = outputs(model, requests, batch_tokens=batch_tokens, label="extrapolation", run=_stream)
    return -torch.tensor(found, dtype=torch.float64)


def _stream(model: Any, requests: Sequence[Stream]) -> list[list[float]]:
    rows = torch.tensor([list(request.ids) for request in requests], device=running.device_of(model))
    parts = running.row_batches(rows, running.vocab_size(model))
    return [nats for part in parts for nats in _read(model, part, requests[0].piece).tolist()]


def _read(model: Any, rows: Tensor, piece: int) -> Tensor:
    cache, found = None, []
    for start in range(0, rows.shape[1] - 1, piece):
        targets = rows[:, start + 1 : start + 1 + piece]
        out = model(input_ids=rows[:, start : start + targets.shape[1]], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(-running.token_nll(out.logits, targets))
    return torch.cat(found, 1)


def check_lengths(model: Any, options: Mapping[str, Any]) -> None:
    """Raise `ZooError` for lengths that the model cannot take or that need `beyond`."""
    _lengths(model, options.get("lengths"), options.get("beyond", False))


def _lengths(model: Any, lengths: Sequence[int] | None, beyond: bool) -> list[int]:
    limit = running.model_limit(model)
    if lengths is None and limit is None:
        raise ZooError("task 'extrapolation': the model states no length that it was made for; pass lengths")
    if lengths is None:
        most = 1 if not beyond or learned_positions(model) else max(MULTIPLES)
        return [max(1, int(multiple * (limit or 1))) for multiple in MULTIPLES if multiple <= most]
    if not lengths:
        raise ZooError("task 'extrapolation': lengths was []; give at least one")
    for length in lengths:
        if not beyond or length < 1:
            running.check_length(model, length, "extrapolation")
        elif limit is not None and length > limit and learned_positions(model):
            raise ZooError(f"task 'extrapolation': length was {length}; the model has learned positions for {limit}")
    return list(lengths)


def learned_positions(model: Any) -> bool:
    """Whether the model looks positions up in a table, which ends."""
    limit, tokens = running.model_limit(model), model.get_input_embeddings()
    tables = (part for part in model.modules() if isinstance(part, nn.Embedding) and part is not tokens)
    return any(limit is not None and limit <= table.num_embeddings <= limit + 2 for table in tables)


def _summary(nll: Tensor, length: int) -> list[Row]:
    row = mean_row("nll", nll.mean(1).tolist(), {"length": length})
    parts = [_stretch("position_perplexity", nll, start, end, {"length": length}) for start, end in buckets(length)]
    return [row, exponential("perplexity", row), *parts]


def _stretch(metric: str, nll: Tensor, start: int, end: int, at: dict[str, int | str]) -> Row:
    place = {**at, "position": start, "end": end}
    return exponential(metric, mean_row("nll", nll[:, start:end].mean(1).tolist(), place))


def _carried(nll: dict[int, Tensor], stretch: int) -> dict[str, list[Row]]:
    """Perplexity of each stretch of the greatest window, with and without what came before; none without both."""
    longest = max(nll)
    if stretch not in nll or longest % stretch or stretch == longest:
        return {}
    parts = [(start, start + stretch) for start in range(0, longest, stretch)]
    read = {"reset": nll[stretch].view(len(nll[longest]), longest), "carried": nll[longest]}
    return {
        state: [_stretch("window_perplexity", found, start, end, {"state": state}) for start, end in parts]
        for state, found in read.items()
    }
