"""Two runs with a result of every kind that the page shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.evals.core.records import Record
from zoo.evals.core.result import Result, Row

CURVE = {"x": [256.0, 512.0], "y": [1.0, 0.85], "low": [0.9, 0.7], "high": [1.0, 0.95]}
RECORDS = [
    Record(
        id=f"{length}/{depth}",
        scores={"accuracy": depth != 50},
        at={"length": length, "depth": depth},
        prompt="<b>What</b> is the number?",
        output="1234567" if depth != 50 else "I <i>forgot</i>",
        answers=("1234567",),
    )
    for length in (256, 1024)
    for depth in (0, 50, 100)
]


def made(ppl: float, needle: float, kl: float, state: int, speed: float) -> dict[str, Result]:
    efficiency = (
        Row("state_bytes", state, at={"length": 32768}),
        Row("prefill_tokens_per_second", speed, n=3, stderr=1.0, at={"length": 512}),
        Row("decode_tokens_per_second", speed / 10, n=3, stderr=1.0, at={"length": 512}),
        Row("state_bytes", 12345, at={"length": 32768, "of": "teacher"}),
    )
    rows: Mapping[str, tuple[tuple[Row, ...], dict[str, Any]]] = {
        "perplexity": ((Row("perplexity", ppl, n=9, stderr=0.21),), {"perplexity_by_position": CURVE}),
        "needle": ((Row("accuracy", needle, n=20, stderr=0.08, at={"length": 512}),), {"needle": CURVE}),
        "fidelity": ((Row("kl", kl, n=9, stderr=0.001),), {"kl_by_position": CURVE}),
        "efficiency": (efficiency, {"state_bytes/model": {"x": [1024.0, 1048576.0], "y": [1e3, 1e6]}}),
    }
    more: dict[str, Any] = {"hardware": {"torch": "9.8.7"}, "options": {"lengths": [512]}}
    return {
        task: Result(task, 1, f"<{task}>", found, series=series, records=RECORDS if task == "needle" else (), **more)
        for task, (found, series) in rows.items()
    }


RUNS = [
    ("teacher & co", made(30.31, 0.95, 0.0, 201326592, 12345.0)),
    ("healed", made(31.4, 0.85, 0.0123, 1048576, 6789.0)),
]
