"""The samples of a task and what a model scored on each: what rows are made of and what the sample browser shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from zoo.evals.core.result import Row
from zoo.evals.core.statistics import mean_row, proportion


@dataclass(frozen=True)
class Record:
    """One sample.

    Args:
        id: its name in the task, the same whatever is asked beside it: "4096/17".
        scores: value by metric, 0 or 1 for a hit.
        at: where it belongs, for instance `{"length": 4096, "depth": 37}`.
        prompt: text or tokens that the model read (its end, where it is long).
        output: what came of it.
        answers: what would have been right.
        tokens: how many tokens the model read.
    """

    id: str
    scores: Mapping[str, float]
    at: Mapping[str, int | str] = field(default_factory=dict)
    prompt: str = ""
    output: Any = ""
    answers: Sequence[Any] = ()
    tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        return cls(**{**data, "answers": tuple(data["answers"])})


def summarised(records: Sequence[Record], by: Sequence[str] = ()) -> list[Row]:
    """Mean of every metric over the records of each place.

    Args:
        by: keys of `at` that make a place; records that lack one of them are left out.

    Returns:
        Rows at those keys. A metric whose values are all 0 or 1 gets a Wilson interval, another one a normal interval.
    """
    places: dict[tuple[tuple[str, int | str], ...], list[Record]] = defaultdict(list)
    for record in records:
        if all(key in record.at for key in by):
            places[tuple((key, record.at[key]) for key in by)].append(record)
    return [
        _row(metric, [float(record.scores[metric]) for record in found if metric in record.scores], dict(place))
        for place, found in places.items()
        for metric in dict.fromkeys(metric for record in found for metric in record.scores)
    ]


def _row(metric: str, values: list[float], at: Mapping[str, int | str]) -> Row:
    if set(values) <= {0.0, 1.0}:
        return proportion(metric, [value == 1 for value in values], at)
    return mean_row(metric, values, at)
