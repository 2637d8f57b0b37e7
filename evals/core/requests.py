"""What a task asks of a model. Requests of one length run together, so nothing is ever padded and no output depends on
its neighbours; each output is remembered as soon as it is there (`zoo.evals.core.journal`).

B batch, T tokens, V vocabulary, P positions.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.evals.core import journal, running
from zoo.evals.core.processes import gathered, share


@dataclass(frozen=True)
class Request:
    """Token ids that the model reads."""

    ids: Sequence[int]
    kind: ClassVar[str] = ""

    @property
    def key(self) -> str:
        """Hash of everything that decides the output of a given model."""
        asked = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        text = json.dumps({**asked, "kind": self.kind}, default=list, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def group(self) -> Any:
        """Requests of one group may run in one batch."""
        return len(self.ids)

    @property
    def blank(self) -> Any:
        """An output of the right form, for a run that only counts."""
        return None

    def score(self, output: Any) -> float | None:
        """What the progress bar shows the mean of."""
        return None


@dataclass(frozen=True)
class LogLikelihood(Request):
    """How likely `ids[start:]` are after `ids[:start]`.

    Its output is `{"logprobs": [one per token, nats], "greedy": whether each is the likeliest}`.
    """

    start: int = 1
    kind: ClassVar[str] = "loglikelihood"

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.ids):
            raise ValueError(f"start was {self.start}; it must be between 1 and {len(self.ids) - 1}")

    @property
    def blank(self) -> dict[str, Any]:
        return {"logprobs": [0.0] * (len(self.ids) - self.start), "greedy": False}

    def score(self, output: dict[str, Any]) -> float:
        """Nats per token."""
        return -sum(output["logprobs"]) / len(output["logprobs"])


@dataclass(frozen=True)
class Predict(Request):
    """The likeliest next token after each of `positions`; its output is a list of tokens.

    Args:
        among: tokens to choose from (default: the whole vocabulary).
    """

    positions: Sequence[int] = ()
    among: Sequence[int] = ()
    kind: ClassVar[str] = "predict"

    @property
    def blank(self) -> list[int]:
        return [0] * len(self.positions)


_counted: ContextVar[list[Request] | None] = ContextVar("counted", default=None)


@contextmanager
def counting() -> Iterator[list[Request]]:
    """Requests made inside the `with` are collected and not run: their outputs are blank."""
    found: list[Request] = []
    token = _counted.set(found)
    try:
        yield found
    finally:
        _counted.reset(token)


def outputs(
    model: Any, requests: Sequence[Request], *, batch_tokens: int | None = None, label: str = "requests",
    run: Callable[[Any, Sequence[Any]], list[Any]] | None = None, variant: str = "",
) -> list[Any]:  # fmt: skip
    """The output of each request, in their order.

    Longest first. A batch for which the GPU has no memory is tried again in halves. With several processes each runs
    its share, and every one gets all outputs. Batches do not depend on what is known from an earlier run: one that was
    not finished runs as a whole, so that a run that was stopped ends with the very bits of one that was not.

    Args:
        batch_tokens: tokens that run together (default: 16384 on CPU, 131072 on GPU); it changes the speed, not the
            outputs.
        label: of the progress bar.
        run: turns a model and a batch of requests into outputs as the requests describe them (default: by their kind).
        variant: says how the model differs from itself, where a task changes it (a branch that is switched off).
    """
    if (counted := _counted.get()) is not None:
        counted.extend(requests)
        return [request.blank for request in requests]
    keys = [variant + request.key for request in requests]
    asked = dict(zip(keys, requests, strict=True))
    known = gathered(journal.known(model, asked))
    limit = batch_tokens or (131072 if running.device_of(model).type == "cuda" else 16384)
    mine = share([batch for batch in _batches(asked, limit) if not known.keys() >= set(batch)])
    done: dict[str, Any] = {}
    scores: list[float] = []
    with running.evaluating(model), running.bar(label, sum(_tokens(asked, batch) for batch in mine)) as advance:
        for batch in mine:
            part = [asked[key] for key in batch]
            found = dict(zip(batch, _attempt(model, part, run or RUNS[part[0].kind]), strict=True))
            journal.remember(model, found)
            done |= found
            scores += [score for key in batch if (score := asked[key].score(found[key])) is not None]
            advance(_tokens(asked, batch), f"{sum(scores) / len(scores):.3f}" if scores else "")
    known |= gathered(done)
    return [known[key] for key in keys]


def _tokens(requests: Mapping[str, Request], batch: Sequence[str]) -> int:
    return sum(len(requests[key].ids) for key in batch)


def _batches(requests: Mapping[str, Request], limit: int) -> Iterator[list[str]]:
    """Keys of requests of one group, at most `limit` tokens together."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for key, request in requests.items():
        groups[request.group].append(key)
    for keys in sorted(groups.values(), key=lambda keys: -len(requests[keys[0]].ids)):
        size = max(1, limit // max(1, len(requests[keys[0]].ids)))
        yield from (keys[start : start + size] for start in range(0, len(keys), size))


def _attempt(model: Any, requests: Sequence[Any], run: Callable[[Any, Sequence[Any]], list[Any]]) -> list[Any]:
    try:
        return run(model, requests)
    except torch.OutOfMemoryError:
        if len(requests) == 1:
            raise
    half = len(requests) // 2
    return [*_attempt(model, requests[:half], run), *_attempt(model, requests[half:], run)]


def _rows(model: Any, requests: Sequence[Request]) -> Tensor:
    return torch.tensor([list(request.ids) for request in requests], device=running.device_of(model))


def _log_likelihoods(model: Any, requests: Sequence[LogLikelihood]) -> list[dict[str, Any]]:
    rows = _rows(model, requests)
    found = []
    budget = running.row_batches(rows, running.vocab_size(model))
    for part in budget:
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        for each, ids in zip(logits, part[:, 1:], strict=True):
            found.append((-running.token_nll(each[None], ids[None])[0], each.argmax(-1) == ids))
    return [
        {"logprobs": logprobs[request.start - 1 :].tolist(), "greedy": bool(best[request.start - 1 :].all())}
        for request, (logprobs, best) in zip(requests, found, strict=True)
    ]


def _predictions(model: Any, requests: Sequence[Predict]) -> list[list[int]]:
    found: list[list[int]] = []
    rows = _rows(model, requests)
    for part in running.row_batches(rows, running.vocab_size(model)):
        logits = model(input_ids=part, use_cache=False).logits
        for request, each in zip(requests[len(found) :], logits, strict=False):
            scores = each[list(request.positions)]
            among = torch.tensor(list(request.among), device=rows.device) if request.among else None
            best = scores.argmax(-1) if among is None else among[scores[:, among].argmax(-1)]
            found.append(best.tolist())
    return found


RUNS: dict[str, Callable[[Any, Sequence[Any]], list[Any]]] = {
    LogLikelihood.kind: _log_likelihoods,
    Predict.kind: _predictions,
}
