"""What a run shows while it trains: a bar per stage with loss and tokens per second; without a terminal, lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from zoo.conversion.core.stages import Stage


class Meter(AbstractContextManager["Meter"]):
    """Progress of a run.

    Args:
        stages: what will run.
        shown: print anything at all.
    """

    def __init__(self, stages: Sequence[Stage], shown: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns, console=self.console, disable=not (shown and self.console.is_terminal))
        totals = {stage.name: stage.steps * stage.step_tokens for stage in stages}
        self.tasks = {name: self.bars.add_task(name, total=total, note="") for name, total in totals.items()}
        self.totals, self.lines, self.last = totals, dict.fromkeys(totals, 0), {}  # type: ignore[var-annotated]

    def __enter__(self) -> Meter:
        self.bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """One line above the bars."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def update(self, stage: str, tokens: int, loss: float) -> None:
        """`stage` has seen `tokens`; `loss` is its mean since the last update."""
        now = time.monotonic()
        before = self.last.get(stage)
        speed = f", {(tokens - before[0]) / max(1e-9, now - before[1]):,.0f} tokens/s" if before else ""
        self.last[stage] = (tokens, now)
        note = f"loss {loss:.4f}{speed}"
        self.bars.update(self.tasks[stage], completed=tokens, note=note)
        tenth = 10 * tokens // self.totals[stage]
        if not self.console.is_terminal and tenth > self.lines[stage]:
            self.lines[stage] = tenth
            self.say(f"{stage}: {tokens:,} of {self.totals[stage]:,} tokens, {note}")
