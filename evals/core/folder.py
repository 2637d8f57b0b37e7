"""The directory of a run: what it is for, the results that are there, and what a run that was stopped left.

run.json          the model, and of each task the version and options
TASK.json         a result as soon as its task ends; results.json has all of them
samples/          the samples of each task, one JSON line each
journal/          every output of the model as it came (`zoo.evals.core.journal`)
timing.json       seconds of each task, which are no two times the same
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zoo.errors import ZooError
from zoo.evals.core import fingerprint, journal, running
from zoo.evals.core.processes import from_main, rank
from zoo.evals.core.result import SCHEMA_VERSION, Result, file_name, read_records, write_json, write_text
from zoo.kernels import dispatch

PATHS = ("data", "examples")


@dataclass
class Folder:
    """Where the results of one model go.

    Args:
        path: the directory; None keeps nothing.
        cache: directory of the journals, to share between runs (default: `journal` in `path`).
    """

    path: Path | None
    cache: Path | None
    model: Any
    identity: Mapping[str, str]
    results: dict[str, Result] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def open(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Note what the run is for.

        Raises:
            ZooError: the directory is another run's, or none of ours; what differs is named.
        """
        if self.path is not None:
            from_main(lambda: self._note(settings))
            timing = self.path / "timing.json"
            self.seconds = json.loads(timing.read_text()) if timing.is_file() else {}

    def _note(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        assert self.path is not None
        note = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise ZooError(f"{self.path} exists and is a file; choose another directory with --out")
        if self.path.is_dir() and any(self.path.iterdir()) and not note.is_file():
            raise ZooError(f"{self.path} exists and is no directory of an evaluation; choose another with --out")
        before: dict[str, Any] = {"model": dict(self.identity), "tasks": {}}
        if note.is_file():
            before = json.loads(note.read_text())
        self._refuse("the model's", before["model"], self.identity)
        for task in settings.keys() & before["tasks"].keys():
            self._refuse(f"{task}'s", before["tasks"][task], json.loads(json.dumps(settings[task], default=str)))
        write_json(note, {"model": before["model"], "tasks": {**before["tasks"], **_plain(settings)}})

    def _refuse(self, whose: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise ZooError(
                    f"{self.path} is of another run: {whose} {name} was {before.get(name)!r}, now it is "
                    f"{now.get(name)!r}; choose another directory with --out"
                )

    def finished(self, task: str) -> Result | None:
        """The result of a task that an earlier run of the same settings finished."""
        file = None if self.path is None else self.path / f"{file_name(task)}.json"
        if self.path is None or file is None or not file.is_file():
            return None
        result = Result.from_dict(json.loads(file.read_text(encoding="utf-8")))
        return replace(result, records=read_records(self.path, task), seconds=self.seconds.get(task, 0.0))

    def answering(self, task: str, version: int) -> AbstractContextManager[None]:
        """Keep what the model answers while the task runs."""
        folder = self.cache or (None if self.path is None else self.path / "journal")
        return journal.opened(folder, fingerprint.hashed([dict(self.identity), task, version]), self.model)

    def keep(self, task: str, result: Result) -> Result:
        """Write a result, and all so far; gives it back with what is known of the run."""
        result = replace(
            result,
            fingerprint=self.identity["weights and config"],
            tokenizer=self.identity["tokenizer"],
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            layer_types=_layer_types(self.model),
            commit=fingerprint.commit(),
        )
        self.results[task] = result
        if self.path is None or rank() != 0:
            return result
        self.seconds[task] = result.seconds
        write_json(self.path / "timing.json", self.seconds)
        if result.records:
            lines = "".join(json.dumps(record.to_dict(), default=float) + "\n" for record in result.records)
            write_text(self.path / "samples" / f"{file_name(task)}.jsonl", lambda: lines)
        write_json(self.path / f"{file_name(task)}.json", result.to_dict())
        every = {name: result.to_dict() for name, result in self.results.items()}
        write_json(self.path / "results.json", {"schema_version": SCHEMA_VERSION, "results": every})
        return result


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _layer_types(model: Any) -> tuple[str, ...]:
    decoder = getattr(model.config, "decoder_config", None)
    if decoder is not None:
        return tuple(layer.mixer or "none" for layer in decoder.layers)
    return tuple(getattr(model.config, "layer_types", None) or ())


def identity_of(model: Any, tokenizer: Any, teacher: Any) -> dict[str, str]:
    """What decides the outputs of a model, by a name that an error can show."""
    found = {
        "weights and config": fingerprint.model_hash(model),
        "tokenizer": fingerprint.tokenizer_hash(tokenizer),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": running.device_of(model).type,
        "attention": str(getattr(model.config, "_attn_implementation", "")),
        "kernels": str(dispatch.pinned()),
        "torch": torch.__version__,
    }
    return found if teacher is None else {**found, "teacher": fingerprint.model_hash(teacher)}


def settings_of(version: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Version and options of a task, files by their content."""
    plain = {name: value for name, value in options.items() if name not in ("batch_tokens", "teacher")}
    paths = {name: fingerprint.path_hash(plain[name]) for name in PATHS if plain.get(name) is not None}
    return {"version": version, **plain, **paths}
