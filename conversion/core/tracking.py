"""Metrics of a run to tensorboard or trackio, where one of them is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from accelerate.tracking import TensorBoardTracker, TrackioTracker

from zoo.errors import ZooError

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",)}


def check_log(log: str | None) -> None:
    """Refuse a `log` that names no known place, or one whose package is not installed.

    Raises:
        ZooError: likewise.
    """
    if log is None:
        return
    kind, _, where = log.partition(":")
    if kind not in PACKAGES or not where:
        raise ZooError(f"log was {log!r}; it must be tensorboard:DIR or trackio:PROJECT")
    if not any(find_spec(name) for name in PACKAGES[kind]):
        raise ZooError(f"log was {log!r}; {kind} is not installed: pip install {kind}")


def tracker(log: str | None, name: str, settings: dict[str, Any]) -> Any:
    """Accelerate's tracker for `tensorboard:DIR` (the run is DIR/NAME) or `trackio:PROJECT`; None for None."""
    if log is None:
        return None
    kind, _, where = log.partition(":")
    made = TensorBoardTracker(name, where) if kind == "tensorboard" else TrackioTracker(where, name=name)
    made.start()
    plain = (int, float, str, bool)
    made.store_init_configuration(
        {key: value if isinstance(value, plain) else repr(value) for key, value in settings.items()}
    )
    return made
