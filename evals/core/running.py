"""Running a model inside an eval: mode, device, batches, length limits, and the record of the run."""

from __future__ import annotations

import inspect
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import ZooError
from zoo.evals.core.result import Result, Row

T = TypeVar("T")
_CHUNK = 2**25
_progress: ContextVar[Any] = ContextVar("progress", default=None)


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the training mode of each model comes back afterwards."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model, mode in zip(models, before, strict=True):
            model.train(mode)


def device_of(model: Any) -> torch.device:
    """Device of the first parameter, where the input ids go."""
    return next(model.parameters()).device


def last_logits(model: Any, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits `[B, V]` after the last of `ids [B, T]`, and the cache, without building logits for the whole prompt."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, **keep)
    return out.logits[:, -1], out.past_key_values


def row_batches(rows: Tensor, vocab_size: int) -> tuple[Tensor, ...]:
    """Batches of whole rows whose logits stay within a memory budget (0.25 GB on CPU, 2 GB on GPU in bf16)."""
    budget = 2**30 if rows.is_cuda else 2**26
    return rows.split(max(1, budget // (rows.shape[1] * vocab_size)))


def model_limit(model: Any) -> int | None:
    """Length that the model was made for, in tokens; None when its config states none."""
    return getattr(model.config, "max_position_embeddings", None)


def check_length(model: Any, length: int, task: str) -> None:
    """Raise `ZooError` if `length` tokens do not fit the model."""
    limit = model_limit(model)
    if length < 1:
        raise ZooError(f"task {task!r}: length was {length}; it must be a positive number of tokens")
    if limit is not None and length > limit:
        raise ZooError(f"task {task!r}: length {length} is beyond the model's {limit} positions; use at most {limit}")


def check_positive(task: str, **values: int | None) -> None:
    """Raise `ZooError` for a count that is given and not positive."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ZooError(f"task {task!r}: {name} was {value}; it must be at least 1")


def require_tokenizer(tokenizer: Any, task: str) -> None:
    """Raise `ZooError` if there is no tokenizer."""
    if tokenizer is None:
        raise ZooError(f"task {task!r} needs a tokenizer and none was given; pass zoo.tokenizer(NAME)")


def vocab_size(model: Any) -> int:
    """Number of logits per position."""
    size: int = model.config.vocab_size
    return size


def name_of(model: Any) -> str:
    """The name the model was loaded under, else its class."""
    return getattr(model.config, "name_or_path", "") or type(model).__name__


def hardware(device: torch.device) -> dict[str, str]:
    """What the numbers were measured on."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def build(
    task: str,
    version: int,
    model: Any,
    rows: Sequence[Row],
    *,
    started: float,
    options: Mapping[str, Any],
    seed: int | None = None,
    truncated: int = 0,
    skipped: int = 0,
    comparable_to: str = "",
    series: Mapping[str, Mapping[str, list[float]]] | None = None,
    records: Sequence[Any] = (),
) -> Result:
    """The `Result` of a task that began at `started` (`time.perf_counter()`)."""
    parameter = next(model.parameters())
    return Result(
        task=task,
        version=version,
        model=name_of(model),
        rows=tuple(rows),
        options=options,
        seed=seed,
        truncated=truncated,
        skipped=skipped,
        comparable_to=comparable_to,
        hardware=hardware(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
        seconds=round(time.perf_counter() - started, 3),
        series=series or {},
        records=tuple(records),
    )


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy `[B, L]` in fp32 of `logits [B, L, V]`, a few positions at a time to bound the fp32 copy."""
    step = max(1, _CHUNK // logits.shape[-1])
    pairs = zip(logits.flatten(0, 1).split(step), targets.flatten().split(step), strict=True)
    parts = [F.cross_entropy(part.float(), target, reduction="none") for part, target in pairs]
    return torch.cat(parts).view_as(targets)


@contextmanager
def show_progress(progress: Any) -> Iterator[None]:
    """Let `track` report to a started `rich.progress.Progress` (None: silently)."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


@contextmanager
def bar(label: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar over `total` tokens, moved on by the function that it gives; a note stands beside the label."""
    progress = _progress.get()
    if progress is None:
        yield lambda tokens, note: None
        return
    task = progress.add_task(label, total=total)
    yield lambda tokens, note: progress.update(task, advance=tokens, description=f"{label} {note}")
    progress.update(task, completed=total)


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """`items` as they are, each counted on the progress bar of the run."""
    progress = _progress.get()
    if progress is None:
        yield from items
        return
    bar = progress.add_task(label, total=total)
    for item in items:
        yield item
        progress.advance(bar)
    progress.update(bar, completed=total)
