"""What the commands show is their own: a console that keeps names whole, tables, errors of one line, and silence from
the libraries below."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from zoo.errors import ZooError

PIPE_WIDTH = 200  # columns where there is no terminal to fit


def console() -> Console:
    """A console on stdout."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def silence() -> None:
    """Turn off the notices and progress bars of transformers, huggingface_hub and datasets."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    from transformers.utils import logging

    logging.disable_progress_bar()


class OneLineErrors(TyperGroup):
    """Bad input ends in one line on stderr and exit code 2; anything unexpected keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ZooError, FileNotFoundError, FileExistsError) as error:
            fail(error, 2)
        except KeyboardInterrupt:
            fail("interrupted", 130)


def fail(error: Exception | str, code: int) -> None:
    message = error
    if isinstance(error, OSError) and error.filename:
        message = f"{error.filename}: {(error.strerror or 'failed').lower()}"
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise typer.Exit(code)


def plan_row(row: Any) -> tuple[str, ...]:
    return row.target, str(row.operation), ", ".join(row.sources), "x".join(map(str, row.shape))


def check_row(name: str, check: dict[str, Any]) -> tuple[str, ...]:
    passed = {True: "yes", False: "no"}.get(check["passed"], "not run" if check.get("reason") else "measured")
    return name, passed, short({key: item for key, item in check.items() if key != "passed" and item})


def short(value: Any) -> str:
    """One line for a check or a number; what is nested stays in the JSON file."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(item)}" for key, item in value.items() if not isinstance(item, dict))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def show_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table()
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    show(table)


def show(table: Table) -> None:
    console().print(table)
