"""The working directory of a healing run: what a later `resume` needs, and the signals that make one necessary."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from zoo.architectures.core.checkpoint import read_json
from zoo.architectures.core.shards import refuse_existing, write_json
from zoo.errors import ZooError


class Work:
    """`OUT.partial`, beside the output: settings, training state, metrics, pools. Removed once the output is whole.

    Args:
        out: the output directory.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f"{out.name}.partial")
        self.state_file, self.metrics_file = self.folder / "state.pt", self.folder / "metrics.jsonl"

    def open(self, out: Path, settings: dict[str, Any], resume: bool) -> None:
        """Start a run, or check that the one to be resumed had the same settings.

        Raises:
            ZooError: the output exists, an unfinished run is in the way, there is none to resume, or it differs.
        """
        refuse_existing(out)
        if not resume:
            if self.folder.exists():
                raise ZooError(f"{self.folder} holds an unfinished run; go on with --resume, or remove it")
            self.folder.mkdir(parents=True)
            write_json(self.folder / "settings.json", settings)
            return
        if not self.folder.is_dir():
            raise ZooError(f"{self.folder} does not exist: nothing to resume; run without --resume")
        before = read_json(self.folder / "settings.json", "settings")
        for name, value in json.loads(json.dumps(settings)).items():
            if before.get(name) != value:
                raise ZooError(f"{name} was {before.get(name)!r} and is now {value!r}; resume with the same settings")

    def save(self, state: dict[str, Any]) -> None:
        """Write the training state, whole or not at all."""
        partial = self.state_file.with_suffix(".writing")
        torch.save(state, partial)
        partial.replace(self.state_file)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The last training state, or None."""
        if not self.state_file.exists():
            return None
        state: dict[str, Any] = torch.load(self.state_file, map_location=device, weights_only=True)
        return state

    def log(self, entry: dict[str, Any]) -> None:
        """One line of metrics."""
        with self.metrics_file.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Interrupt:
    """Set by the first Ctrl-C or SIGTERM inside `held`; a second one acts at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals back, so that a step is never left half done. Only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
