"""What an eval returns: rows of numbers with their uncertainty, and everything needed to repeat them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

SCHEMA_VERSION = 2
_RESERVED = ("metric", "value", "n", "stderr", "ci95")


@dataclass(frozen=True)
class Row:
    """One number.

    Args:
        metric: its name, for instance "accuracy".
        value: the number itself.
        n: how many independent samples it rests on; None for a number that is computed, not sampled.
        stderr: standard error of `value`.
        ci95: 95% confidence interval, (low, high).
        at: where it was taken, for instance `{"length": 1024}`.
    """

    metric: str
    value: float
    n: int | None = None
    stderr: float | None = None
    ci95: tuple[float, float] | None = None
    at: Mapping[str, int | str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A flat dictionary: the keys of `at` stand beside the others."""
        interval = None if self.ci95 is None else list(self.ci95)
        head = {"metric": self.metric, "value": self.value, "n": self.n, "stderr": self.stderr, "ci95": interval}
        return {**head, **self.at}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        interval = data.get("ci95")
        return cls(
            metric=data["metric"],
            value=data["value"],
            n=data.get("n"),
            stderr=data.get("stderr"),
            ci95=None if interval is None else (interval[0], interval[1]),
            at={key: value for key, value in data.items() if key not in _RESERVED},
        )


@dataclass(frozen=True)
class Result:
    """The outcome of one task on one model.

    Args:
        task, version: which task, and the version of its definition: numbers of different versions do not compare.
        model: name of the model.
        rows: the numbers.
        options: the options that the task ran with, defaults included.
        seed: seed of everything that was sampled.
        truncated: samples that were cut to fit (tasks here refuse instead, so 0).
        skipped: items left out, for instance the tokens after the last whole window.
        hardware: cpu, gpu, torch and transformers versions.
        dtype: dtype of the weights.
        seconds: wall time of the task; kept beside the results, which are the same for every run.
        series: curves for the report, name -> {"x": [...], "y": [...], "low": [...], "high": [...]}.
        comparable_to: whose numbers these compare with ("ruler-nv"), or what sets them apart.
        fingerprint, tokenizer, data: hashes of weights and config, of the tokenizer, of the files that were read.
        parameters, layer_types: of the model.
        commit: of this library where it is a checkout, else its version.
        records: the samples (`zoo.evals.core.records.Record`), written to a file of their own.
    """

    task: str
    version: int
    model: str
    rows: tuple[Row, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    truncated: int = 0
    skipped: int = 0
    hardware: Mapping[str, str] = field(default_factory=dict)
    dtype: str = ""
    seconds: float = field(default=0.0, compare=False)
    series: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    comparable_to: str = ""
    fingerprint: str = ""
    tokenizer: str = ""
    data: str = ""
    parameters: int = 0
    layer_types: Sequence[str] = ()
    commit: str = ""
    records: Sequence[Any] = field(default=(), compare=False)

    def select(self, metric: str, **at: int | str) -> Iterator[Row]:
        """Rows of `metric` whose place agrees with `at`."""
        for row in self.rows:
            if row.metric == metric and all(row.at.get(key) == value for key, value in at.items()):
                yield row

    def row(self, metric: str, **at: int | str) -> Row:
        """The first row of `metric` at `at`.

        Raises:
            ZooError: there is none.
        """
        found = next(self.select(metric, **at), None)
        if found is None:
            known = ", ".join(sorted({row.metric for row in self.rows})) or "(none)"
            raise ZooError(f"{self.task} has no {metric!r} at {at}; its metrics are: {known}")
        return found

    def value(self, metric: str, **at: int | str) -> float:
        """The value of `row(metric, **at)`."""
        return self.row(metric, **at).value

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        data = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("rows", "options", "series", "records", "seconds")
        }
        data["layer_types"] = list(self.layer_types)
        data["hardware"] = dict(self.hardware)
        series = {name: {key: list(points) for key, points in curve.items()} for name, curve in self.series.items()}
        rows = [row.to_dict() for row in self.rows]
        return {"schema_version": SCHEMA_VERSION, **data, "options": dict(self.options), "rows": rows, "series": series}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The inverse of `to_dict`.

        Raises:
            ZooError: the data was written by a newer version of this library.
        """
        schema = data.get("schema_version")
        if schema not in range(1, SCHEMA_VERSION + 1):
            raise ZooError(
                f"results have schema version {schema}, this library reads 1 to {SCHEMA_VERSION}; update hybrid-zoo"
            )
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data and f.name != "records"}
        known["layer_types"] = tuple(data.get("layer_types", ()))
        return cls(**{**known, "rows": tuple(Row.from_dict(row) for row in data["rows"])})


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` to `path` at once: a reader sees the old file or the whole new one."""
    write_text(Path(path), lambda: json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: Callable[[], str]) -> None:
    """Write what `text()` gives to `path` at once; nothing is left behind if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text(), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_results(path: str | Path) -> dict[str, Result]:
    """The results in a `results.json` or in the directory that holds one, by task, with the samples beside it.

    Raises:
        ZooError: the file is missing or is no results file.
    """
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        results = {task: Result.from_dict(entry) for task, entry in data["results"].items()}
        return {task: replace(result, records=read_records(path.parent, task)) for task, result in results.items()}
    except FileNotFoundError:
        raise ZooError(f"results file {str(path)!r} does not exist; write one with `zoo eval ... --out DIR`") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ZooError(f"{str(path)!r} is not a results file ({type(error).__name__}: {error})") from error


def file_name(task: str) -> str:
    """The name of a task as the name of a file."""
    return re.sub(r"[^\w.+-]", "_", task)


def read_records(folder: Path, task: str) -> tuple[Any, ...]:
    """The samples of a task beside its results; none where none were kept."""
    from zoo.evals.core.records import Record  # which imports this module

    path = folder / "samples" / f"{file_name(task)}.jsonl"
    if not path.is_file():
        return ()
    return tuple(Record.from_dict(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line)
