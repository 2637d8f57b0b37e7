"""The six tasks of MAD (Poli et al. 2024, arXiv:2403.17844), for models trained on them.

Example of `in_context_recall` with `length=10` (keys `a b`, values `x y`; a label judges the prediction after it):

    ids      a  x  b  y  a  x  b  y  a
    labels               x     y     x

`noisy_in_context_recall` has pairs of noise tokens between; in `fuzzy_in_context_recall` keys and values have several
tokens; `selective_copying` asks for the tokens among blanks; `memorization` for values that are the same in every row;
`compression` for the whole row, from the state after its last token: for that the model is an
`zoo.evals.core.auto_encoder.AutoEncoder`. Rows to train on: `zoo.evals.core.mad_rows.rows`. MAD's own protocol takes
the best of six training runs of each setting, varies one factor at a time and averages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.labelled import ask, macro_accuracy
from zoo.evals.core.mad_rows import BASELINES, Setting, least, row
from zoo.evals.core.records import summarised
from zoo.evals.core.result import Result

VERSION = 1
NEEDS = ()


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    tasks: Sequence[str] | None = None,
    vocab_size: int | None = None,
    length: int | None = None,
    noise: float | None = None,
    copies: int | None = None,
    samples: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on rows of each task.

    Args:
        tokenizer: not used.
        tasks: names of MAD's tasks (default: `compression` for an auto-encoder; for another model the other five, as
            far as its vocabulary and length go).
        vocab_size, length, noise, copies: changes to the tasks' baselines: tokens, tokens of a row, share of noise
            pairs (noisy recall alone), tokens to copy (selective copying alone).
        samples: rows per task; MAD tests on 1280.
        seed: seed of everything but the memory.
        batch_tokens: tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows at {"task": name}: `accuracy`, the share of a row's labels that are predicted, mean over rows;
        `macro_accuracy`, MAD's number.

    Raises:
        ZooError: an unknown task, one that the model cannot do, or a setting out of range.
    """
    started = time.perf_counter()
    running.check_positive("mad", samples=samples, vocab_size=vocab_size, length=length, copies=copies)
    if noise is not None and not 0 <= noise < 1:
        raise ZooError(f"task 'mad': noise was {noise}; it must be at least 0 and less than 1")
    changes = {"vocab_size": vocab_size, "length": length, "noise": noise, "copies": copies}
    settings = {task: _setting(task, changes) for task in _names(tasks)}
    reads_back = getattr(model, "reads_rows_back", False)
    if tasks is None:
        settings = {task: setting for task, setting in settings.items() if _held(model, task, setting, reads_back)}
    if not settings:
        raise ZooError("task 'mad': tasks was [], or the model has no room for any; give tasks, vocab_size or length")
    for task, setting in settings.items():
        _check(model, task, setting, reads_back)
    records, macro = [], []
    for task, setting in settings.items():
        made = [row(task, i, seed, setting) for i in range(samples)]
        found = ask(model, "mad", made, {"task": task}, batch_tokens)
        records += found
        macro.append(macro_accuracy(found, {"task": task}))
    options = {"settings": {task: asdict(setting) for task, setting in settings.items()}, "samples": samples}
    return running.build(
        "mad", VERSION, model, summarised(records, by=["task"]) + macro,
        started=started, options=options, seed=seed, records=records,
    )  # fmt: skip


def _names(tasks: Sequence[str] | None) -> list[str]:
    for task in tasks or ():
        if task not in BASELINES:
            raise ZooError(f"task 'mad': tasks has {task!r}; choose from: {', '.join(BASELINES)}")
    return list(BASELINES if tasks is None else tasks)


def _setting(task: str, changes: dict[str, Any]) -> Setting:
    takes = {"vocab_size", "length"}
    takes |= {"noise"} if task == "noisy_in_context_recall" else {"copies"} if task == "selective_copying" else set()
    return replace(BASELINES[task], **{key: changes[key] for key in takes if changes[key] is not None})


def _held(model: Any, task: str, setting: Setting, reads_back: bool) -> bool:
    limit = running.model_limit(model)
    fits = setting.vocab_size <= running.vocab_size(model) and (limit is None or setting.length <= limit)
    return fits and (task == "compression") == reads_back


def _check(model: Any, task: str, setting: Setting, reads_back: bool) -> None:
    tokens, length = least(task, setting)
    held = running.vocab_size(model)
    if not tokens <= setting.vocab_size <= held:
        raise ZooError(f"task 'mad': vocab_size of {task} was {setting.vocab_size}; it must be {tokens} to {held}")
    if setting.length < length:
        raise ZooError(f"task 'mad': length of {task} was {setting.length}; it must be at least {length}")
    running.check_length(model, setting.length, "mad")
    if (task == "compression") != reads_back:
        which = "an AutoEncoder (zoo.evals.core.auto_encoder)" if task == "compression" else "a causal model"
        raise ZooError(f"task 'mad': {task} was asked of {type(model).__name__}; it needs {which}")
