"""Run tasks on a model and save each result as soon as it is there."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from zoo import registry
from zoo.errors import ZooError
from zoo.evals.core import lm_eval, running
from zoo.evals.core.folder import Folder, identity_of, settings_of
from zoo.evals.core.result import Result
from zoo.evals.core.text import read_text


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    tasks: Sequence[str],
    teacher: Any = None,
    data: str | Path | None = None,
    examples: str | Path | None = None,
    lengths: Sequence[int] | None = None,
    samples: int | None = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Result]:
    """Evaluate `model` on `tasks`; every task gets those of the arguments that it takes.

    Args:
        model: a loaded causal language model, or its name, directory or hub id (loaded on the GPU where there is one).
        tokenizer: its tokenizer, or a name; by default that of the model's name or directory.
        tasks: names of tasks, see `zoo.list("evals")`.
        teacher: a loaded model or a name, for tasks that compare.
        data: a .txt, .md or .xz file, for tasks that need text.
        examples: a .jsonl file, or a directory of such files, for tasks that are a list of examples.
        lengths: lengths in tokens, for tasks that sweep them.
        samples: samples per length, for tasks that sample.
        out: folder that gets `TASK.json` as each task ends and `results.json` with all of them (see
            `zoo.evals.core.folder`). The same call with the same folder goes on where it was stopped.
        cache: folder of what models answered, to share between runs (default: inside `out`). It is known by the hash of
            weights, config, tokenizer and the task's version.
        seed: seed of everything that is sampled.
        progress: show progress bars on stderr when it is a terminal.
        options: more options by task, for instance `{"perplexity": {"length": 1024}}`; they win over the rest.

    Returns:
        The results by task, in the order of `tasks`.

    Raises:
        ZooError: an unknown task or option, a missing tokenizer, teacher or data file, or a length that does not fit.
            What can be checked is checked before the first task starts and before anything is written.
    """
    families = {task: _family(task) for task in _names(tasks)}
    shared = {"data": data, "examples": examples, "lengths": lengths, "samples": samples, "seed": seed}
    chosen = {task: _options(task, family, shared, dict(options or {})) for task, family in families.items()}
    _check_data(families, chosen)
    name = str(model) if isinstance(model, str | Path) else None
    model = _load(model)
    if any("tokenizer" in family.NEEDS or chosen[task].get("data") for task, family in families.items()):
        tokenizer = _load_tokenizer(tokenizer, str(name or getattr(model.config, "name_or_path", "")))
    teacher = None if teacher is None else _load(teacher)
    for task, family in families.items():
        _check(task, family, model, tokenizer, teacher, chosen[task])
    folder = Folder(_path(out), _path(cache), model, identity_of(model, tokenizer, teacher))
    folder.open({task: settings_of(family.VERSION, chosen[task]) for task, family in families.items()})
    with _bars(progress):
        for task, family in families.items():
            found = folder.finished(task)
            if found is None:
                with folder.answering(task, family.VERSION):
                    found = family.evaluate(model, tokenizer, **_given(family, chosen[task], teacher))
                found = found if name is None else replace(found, model=name)
            folder.keep(task, found)
    return folder.results


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _given(family: ModuleType, options: Mapping[str, Any], teacher: Any) -> dict[str, Any]:
    takes = inspect.signature(family.evaluate).parameters
    return {**({"teacher": teacher} if "teacher" in takes else {}), **options}


def _names(tasks: Sequence[str]) -> list[str]:
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ZooError(f"no tasks were given; choose from: {', '.join(registry.names('evals'))}")
    return names


def _family(task: str) -> Any:
    """The module of a task, or what stands for one of lm-evaluation-harness."""
    return lm_eval.family(task) if task.startswith(lm_eval.PREFIX) else registry.load("evals", task)


def _options(task: str, family: ModuleType, shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The shared options that the task takes and that are set, and its own."""
    takes = inspect.signature(family.evaluate).parameters
    extra = dict(own.get(task, {}))
    for name in extra:
        if name not in takes:
            known = ", ".join(p.name for p in takes.values() if p.kind is p.KEYWORD_ONLY)
            raise ZooError(f"task {task!r} has no option {name!r}; its options are: {known}")
    return {**{key: value for key, value in shared.items() if key in takes and value is not None}, **extra}


def _check_data(families: Mapping[str, ModuleType], chosen: Mapping[str, Mapping[str, Any]]) -> None:
    for task, family in families.items():
        if "data" in family.NEEDS:
            read_text(chosen[task].get("data"), task)
        if "examples" in family.NEEDS:
            family.read(chosen[task].get("examples"))


def _check(task: str, family: ModuleType, model: Any, tokenizer: Any, teacher: Any, options: Mapping[str, Any]) -> None:
    if "tokenizer" in family.NEEDS:
        running.require_tokenizer(tokenizer, task)
    if "teacher" in family.NEEDS:
        family.check_teacher(model, options.get("teacher", teacher))
    if hasattr(family, "check_lengths"):  # a task that may go beyond the model's limit
        return family.check_lengths(model, options)
    for length in options.get("lengths") or ():
        running.check_length(model, length, task)


def _load(model: Any) -> Any:
    if not isinstance(model, str | Path):
        return model
    loading = importlib.import_module("zoo.loading")
    if torch.cuda.is_available():
        return loading.from_pretrained(str(model)).to("cuda")
    # most CPUs are many times slower in bf16 than in fp32
    return loading.from_pretrained(str(model), dtype=torch.float32)


def _load_tokenizer(tokenizer: Any, default: str) -> Any:
    """The given tokenizer; by default that of the model's name, None for a model without a name."""
    source = default if tokenizer is None else tokenizer
    if not isinstance(source, str | Path):
        return source
    return importlib.import_module("zoo.loading").tokenizer(str(source)) if source else None


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    if not (wanted and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress, running.show_progress(progress):
        yield
