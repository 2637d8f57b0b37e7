"""Layer selection by name: `zoo.conversion.core.select` on lists of eval `key_value` and on a text file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from zoo import loading, registry
from zoo.conversion.core.judge import Samples
from zoo.conversion.core.recall import Probe
from zoo.conversion.core.select import Selection, wanted
from zoo.conversion.core.select import select as measured_selection
from zoo.errors import ZooError
from zoo.evals.core.text import bos_ids, encode, read_text, windows

FORM = "repeat"  # of eval key_value: with a sentence that says what is asked


def select(
    teacher: str | Path,
    out: str | Path,
    *,
    keep: int,
    bank: str | Path | None = None,
    data: str | Path | None = None,
    by: str | None = None,
    methods: Sequence[str] | None = None,
    samples: int = 16,
    pairs: int = 24,
    length: int = 512,
    window: int = 64,
    seed: int = 0,
    resume: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> Selection:
    """Rank the layers of a softmax model by how much they need their attention; see `docs/select.md`.

    Args:
        teacher: registered name, directory or hub id of the model.
        out: the directory to write: `ranking.json`, `ranking.svg`, `keep.txt`. It must not exist.
        keep: layers to keep.
        bank: a conversion of all its layers of which the mixers are aligned and nothing else was trained.
        data: a text file (.txt, .md or .xz), for the methods that measure on text.
        by: the method that decides; by default `swap_recall` with a bank, else `heads`.
        methods: those to run; by default all that have what they need.
        samples: lists of keys and values, and windows of text.
        pairs: pairs in a list.
        length: tokens of a window of text.
        window: tokens that a local head sees in the head probe.
        seed: of the lists.
        resume: go on from `OUT.partial`.
        device: `cuda` or `cpu`; by default the GPU where there is one.
        progress: show progress on stderr.

    Raises:
        ZooError: bad input, nothing is written then; or a teacher that recalls nothing of the lists.
    """
    for name, value in (("samples", samples), ("pairs", pairs), ("length", length), ("window", window)):
        if value < 1:
            raise ZooError(f"{name} was {value}; it must be at least 1")
    tokenizer = loading.tokenizer(str(teacher))
    text = None if data is None else windows(read_text(data, "select"), tokenizer, length, samples).rows
    measured = Samples(key_value_probes(tokenizer, pairs, samples, seed), text)
    wanted(methods, by, measured, bank)
    settings = {"data": None if data is None else str(data), "samples": samples, "pairs": pairs, "length": length}
    columns = (TextColumn("{task.fields[now]}"), BarColumn(), TextColumn("{task.completed} of {task.total}"))
    console = Console(stderr=True, quiet=not progress)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None, now="")
        return measured_selection(
            teacher,
            out,
            measured,
            keep=keep,
            bank=bank,
            by=by,
            methods=methods,
            window=window,
            resume=resume,
            settings={**settings, "seed": seed, "methods": None if methods is None else list(methods), "by": by},
            device=device,
            step=lambda name, total: bar.update(task, advance=1, total=total, now=name),
        )


def key_value_probes(tokenizer: Any, pairs: int, samples: int, seed: int = 0) -> list[Probe]:
    """The lists of eval `key_value`, each with its answer behind it."""
    prompt = registry.load("evals", "key_value").prompt
    start, found = bos_ids(tokenizer), []
    for sample in range(samples):
        text, value = prompt(pairs, sample, seed, FORM)
        head, whole = start + encode(tokenizer, text), start + encode(tokenizer, f"{text} {value}")
        if whole[: len(head)] != head or len(whole) == len(head):
            raise ZooError("the teacher's tokenizer joins a question and its answer; the lists cannot be asked of it")
        found.append(Probe(whole, len(head)))
    return found
