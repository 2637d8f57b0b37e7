"""How close a model's next-token distributions are to a teacher's, on a text file.

Example: where the teacher gives `the` 0.5 and `a` 0.5 and the model gives them 0.25 and 0.75, the token's divergence
KL(teacher || model) is 0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75) = 0.144 nats.

V vocabulary, B batch, L window length, N windows.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.result import Result, Row
from zoo.evals.core.statistics import centre, curve, mean_row
from zoo.evals.core.text import buckets, read_text
from zoo.evals.core.text import windows as cut

VERSION = 1
NEEDS = ("tokenizer", "data", "teacher")
_CHUNK = 2**23


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    teacher: Any = None,
    data: str | Path | None = None,
    length: int | None = None,
    windows: int | None = 32,
) -> Result:
    """Divergence of `model` from `teacher` on the windows of `data`.

    Args:
        teacher: a causal language model over the same vocabulary.
        data: a .txt, .md or .xz file.
        length: tokens per window (default: 2048, or the limit of either model if that is less).
        windows: at most this many windows, from the start of the text (None: all).

    Returns:
        Rows `kl` (nats per token), `top1_agreement`, and `position_kl` at {"position": start, "end": end}.
        Standard errors are over windows.

    Raises:
        ZooError: no teacher, another vocabulary, no tokenizer, no usable data, or a length beyond either model's.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "fidelity")
    running.check_positive("fidelity", windows=windows)
    check_teacher(model, teacher)
    limits = [running.model_limit(m) or 2048 for m in (model, teacher)]
    length = min(2048, *limits) if length is None else length
    for either in (model, teacher):
        running.check_length(either, length, "fidelity")
    cuts = cut(read_text(data, "fidelity"), tokenizer, length, windows)
    kl, agree = window_divergence(model, teacher, cuts.rows)
    positions = [_bucket(kl, start, end) for start, end in buckets(length)]
    rows = [mean_row("kl", kl.mean(1).tolist()), mean_row("top1_agreement", agree.mean(1).tolist())]
    options = {"data": str(data), "length": length, "windows": len(kl), "teacher": running.name_of(teacher)}
    return running.build(
        "fidelity",
        VERSION,
        model,
        rows + positions,
        started=started,
        options=options,
        skipped=cuts.skipped,
        series={"kl_by_position": curve(positions, centre)},
    )


def check_teacher(model: Any, teacher: Any) -> None:
    """Raise `ZooError` unless `teacher` is a model over the vocabulary of `model`."""
    if teacher is None:
        raise ZooError("task 'fidelity' compares with a teacher and none was given; pass --teacher NAME")
    sizes = running.vocab_size(teacher), running.vocab_size(model)
    if sizes[0] != sizes[1]:
        raise ZooError(
            f"task 'fidelity': the teacher has {sizes[0]} tokens and the model {sizes[1]}; they must share a vocabulary"
        )


def window_divergence(model: Any, teacher: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || model) in nats and top-1 agreement, each `[N, L]` in fp64, for `rows [N, L + 1]`."""
    rows = rows[:, :-1].to(running.device_of(model))
    batches = running.row_batches(rows, 2 * running.vocab_size(model))
    divergences, agreements = [], []
    with running.evaluating(model, teacher):
        for batch in running.track(batches, "fidelity", len(batches)):
            student = model(input_ids=batch, use_cache=False).logits
            target = teacher(input_ids=batch.to(running.device_of(teacher)), use_cache=False).logits
            kl, agree = divergence(target.to(student.device), student)
            divergences.append(kl.double().cpu())
            agreements.append(agree.double().cpu())
    return torch.cat(divergences), torch.cat(agreements)


def divergence(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and top-1 agreement `[B, L]` of logits `[B, L, V]`, in fp32, a few positions at a time."""
    step = max(1, _CHUNK // student.shape[-1])
    pairs = zip(teacher.flatten(0, 1).split(step), student.flatten(0, 1).split(step), strict=True)
    kl, agree = zip(*(_divergence(t.float(), s.float()) for t, s in pairs), strict=True)
    return torch.cat(kl).view(student.shape[:-1]), torch.cat(agree).view(student.shape[:-1])


def _divergence(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    # a token that the teacher rules out (-inf) adds nothing, where exp(-inf) * inf would be NaN
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    return terms.sum(-1), teacher.argmax(-1) == student.argmax(-1)


def _bucket(kl: Tensor, start: int, end: int) -> Row:
    return mean_row("position_kl", kl[:, start:end].mean(1).tolist(), {"position": start, "end": end})
