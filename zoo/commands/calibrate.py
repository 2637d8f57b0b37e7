"""`zoo calibrate`: what a method needs to know about each layer of a model, from sample text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from zoo import loading
from zoo.architectures.core import calibration
from zoo.architectures.core.methods import Choice
from zoo.architectures.core.shards import refuse_existing
from zoo.errors import ZooError
from zoo.evals.core.text import read_text, windows


def run(
    model: str, method: str, data: str, out: Path, *, args: Mapping[str, Any], samples: int, length: int
) -> dict[str, Any]:
    """Calibrate `method` for a model on the first `samples` windows of `length` tokens of `data`; write `out`.

    Raises:
        ZooError: an unknown method or one without calibration, unusable data, or `out` exists.
    """
    if "+" in method or method.endswith(".json"):
        raise ZooError(f"method was {method!r}; one method is calibrated at a time, by its name")
    choice = Choice.parse(method, args)
    calibration.function_of(method)
    refuse_existing(out)
    for name, value in (("--samples", samples), ("--length", length)):
        if value < 1:
            raise ZooError(f"{name} was {value}; it must be at least 1")
    rows = windows(read_text(data, "calibrate"), loading.tokenizer(model), length, samples).rows[:, :-1]
    gpu = torch.cuda.is_available()
    options: dict[str, Any] = dict(attention=method, attention_args=args)
    options |= {} if gpu else {"dtype": torch.float32}
    loaded = loading.from_pretrained(model, **options).to("cuda" if gpu else "cpu")
    columns = (TextColumn("layer {task.completed} of {task.total}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(method, total=loaded.config.get_text_config(decoder=True).num_hidden_layers)
        layers = calibration.calibrate(loaded, choice, rows.to(loaded.device), lambda layer: progress.advance(bar))
    return calibration.write(out, choice, model, rows, layers)
