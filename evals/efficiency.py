"""What a token costs: bytes of state by length, tokens per second, peak memory.

Example: a decoder with 12 layers, 2 KV heads of 64 in bf16 keeps 2 x 12 x 2 x 64 x 2 = 6144 bytes per token, so 192 MiB
at 32768 tokens; a recurrent layer keeps the same number of bytes at every length.

With a teacher both models are measured in the same run, their repeats interleaved, so that both see the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.evals.core import running
from zoo.evals.core.memory import peak_bytes, state_bytes
from zoo.evals.core.result import Result, Row

VERSION = 1
NEEDS = ()
STATE_LENGTHS = (1024, 4096, 32768, 131072, 1048576)
DEFAULT_LENGTHS = (512, 2048)
WARM_UP = 2
Timing = tuple[float, float]


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    teacher: Any = None,
    lengths: Sequence[int] | None = None,
    repeats: int = 5,
    new_tokens: int = 32,
    batch: int = 1,
    seed: int = 0,
) -> Result:
    """State size and speed of `model`, and of `teacher` beside it when there is one.

    Args:
        tokenizer: not used; prompts are random tokens.
        teacher: a second model, measured in the same run on the same prompts.
        lengths: prompt lengths in tokens for the measurements (default: 512 and 2048 as far as the model goes).
        repeats: measurements after 2 warm-up runs; the median counts.
        new_tokens: tokens decoded per measurement, after a prompt of the given length.
        batch: sequences at once.
        seed: seed of the prompts.

    Returns:
        Rows `state_bytes` at {"length": L} for one sequence at 1k to 1M tokens, computed; and, measured at each of
        `lengths`, `prefill_tokens_per_second`, `decode_tokens_per_second`, `peak_bytes` of prefill and decode without
        the weights. The teacher's rows carry {"of": "teacher"}.

    Raises:
        ZooError: a length beyond a model's, or a model whose state size is unknown.
    """
    started = time.perf_counter()
    running.check_positive("efficiency", repeats=repeats, new_tokens=new_tokens, batch=batch)
    models = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    lengths = _default_lengths(models.values(), new_tokens) if lengths is None else tuple(lengths)
    for length in lengths:
        for either in models.values():
            running.check_length(either, length, "efficiency")
    sizes = {of: [state_bytes(either, length) for length in STATE_LENGTHS] for of, either in models.items()}
    rows = [
        Row("state_bytes", value, at=_at(length, of))
        for of, values in sizes.items()
        for length, value in zip(STATE_LENGTHS, values, strict=True)
    ]
    for length in running.track(lengths, "efficiency", len(lengths)):
        rows += _measure(models, length, batch, new_tokens, repeats, seed)
    options = {"lengths": list(lengths), "repeats": repeats, "new_tokens": new_tokens, "batch": batch}
    x = [float(length) for length in STATE_LENGTHS]
    series = {f"state_bytes/{of}": {"x": x, "y": [float(value) for value in values]} for of, values in sizes.items()}
    return running.build("efficiency", VERSION, model, rows, started=started, options=options, seed=seed, series=series)


def _default_lengths(models: Any, new_tokens: int) -> tuple[int, ...]:
    limit = min(running.model_limit(model) or max(DEFAULT_LENGTHS) for model in models)
    return tuple(length for length in DEFAULT_LENGTHS if length <= limit) or (max(1, limit - new_tokens),)


def _at(length: int, of: str) -> dict[str, int | str]:
    return {"length": length} if of == "model" else {"length": length, "of": of}


def _measure(models: dict[str, Any], length: int, batch: int, new_tokens: int, repeats: int, seed: int) -> list[Row]:
    prompts = {of: _prompt(model, batch, length, seed) for of, model in models.items()}
    rows, times = [], {of: list[Timing]() for of in models}
    with running.evaluating(*models.values()):
        for of, model in models.items():
            peak = peak_bytes(running.device_of(model), partial(_run, model, prompts[of], new_tokens))
            rows.append(Row("peak_bytes", peak, n=1, at=_at(length, of)))
        for _ in range(WARM_UP + repeats):
            for of, model in models.items():
                times[of].append(_run(model, prompts[of], new_tokens))
    for of in models:
        rows += _speeds(times[of][WARM_UP:], batch * length, batch * new_tokens, _at(length, of))
    return rows


def _prompt(model: Any, batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(running.vocab_size(model), (batch, length), generator=generator)
    return ids.to(running.device_of(model))


def _run(model: Any, ids: Tensor, new_tokens: int) -> Timing:
    """Seconds of the prompt and seconds of `new_tokens` single steps after it."""
    now = _clock(ids.device)
    start = now()
    logits, cache = running.last_logits(model, ids)
    middle = now()
    for _ in range(new_tokens):
        logits, cache = running.last_logits(model, logits.argmax(-1, keepdim=True), cache)
    return middle - start, now() - middle


def _clock(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def _speeds(times: Sequence[Timing], prompt_tokens: int, new_tokens: int, at: dict[str, int | str]) -> list[Row]:
    prefill = sorted(prompt_tokens / seconds for seconds, _ in times)
    decode = sorted(new_tokens / seconds for _, seconds in times)
    return [_speed("prefill_tokens_per_second", prefill, at), _speed("decode_tokens_per_second", decode, at)]


def _speed(metric: str, speeds: Sequence[float], at: dict[str, int | str]) -> Row:
    """The median; the standard error is that of a median of normal noise."""
    n = len(speeds)
    stderr = 1.2533 * statistics.stdev(speeds) / n**0.5 if n > 1 else None
    return Row(metric, statistics.median(speeds), n=n, stderr=stderr, at=at)
