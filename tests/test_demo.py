"""The demo on a tiny teacher: every model is made, compared and reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo import demo
from zoo.evals.core.result import Result, Row

BUDGET = demo.Budget(
    align_tokens=2048,
    distill_tokens=4096,
    text_rows=8,
    length=128,
    lengths=(64,),
    tasks=("perplexity", "fidelity", "efficiency"),
)


def test_demo_compares_teacher_window_swapped_and_healed(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    results = demo.run(out, str(tiny_llama), BUDGET)
    assert list(results) == ["teacher", "window", "swapped", "healed"]
    kl = {name: result["fidelity"].value("kl") for name, result in results.items()}
    assert kl["teacher"] < 1e-9 < min(kl["window"], kl["swapped"], kl["healed"])
    assert {path.name for path in out.iterdir()} == {
        "window",
        "swapped",
        "healed",
        "results",
        "text.txt",
        "index.html",
    }
    assert all((out / "results" / name / "results.json").exists() for name in results)
    said = capsys.readouterr().out
    assert f"swapped {kl['swapped']:.4g}, healed {kl['healed']:.4g}" in said


def test_findings_are_the_measured_numbers() -> None:
    def measured(kl: float, state: float) -> dict[str, Result]:
        rows = (Row("state_bytes", 1.0, at={"length": 1024}), Row("state_bytes", state, at={"length": demo.STATE_AT}))
        return {
            "fidelity": Result("fidelity", 1, "m", rows=(Row("kl", kl),)),
            "efficiency": Result("efficiency", 1, "m", rows=rows),
        }

    results = {"teacher": measured(0.0, 4e6), "swapped": measured(0.5, 1e6), "healed": measured(0.1, 1e6)}
    kl, state = demo.findings(results)
    assert "swapped 0.5, healed 0.1" in kl and "0.200 of the swapped" in kl
    assert "teacher 4.00 MB, healed 1.00 MB" in state
