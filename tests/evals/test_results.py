"""Results survive the disk, intervals are right, and the runner checks before it starts."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import zoo
from zoo import registry
from zoo.errors import ZooError
from zoo.evals.core.result import Result, Row, read_results, write_json
from zoo.evals.core.runner import evaluate
from zoo.evals.core.statistics import curve, exponential, mean_row, proportion, wilson

TASKS = ["perplexity", "needle", "fidelity", "efficiency"]
SMALL: dict[str, dict[str, Any]] = {
    "perplexity": {"length": 64, "windows": 3},
    "fidelity": {"length": 32, "windows": 2},
    "efficiency": {"lengths": [32], "repeats": 1, "new_tokens": 2},
}


def run(model: Any, tokenizer: Any, text: Path, **more: Any) -> dict[str, Result]:
    arguments = {"teacher": model, "data": text, "lengths": [600], "samples": 2, "options": SMALL, "progress": False}
    return evaluate(model, tokenizer, tasks=more.pop("tasks", TASKS), **{**arguments, **more})


def test_results_survive_the_disk(llama: Any, tokenizer: Any, text: Path, tmp_path: Path) -> None:
    results = run(llama, tokenizer, text, out=tmp_path)
    assert list(results) == TASKS
    assert read_results(tmp_path / "results.json") == results
    for task in TASKS:
        assert Result.from_dict(json.loads((tmp_path / f"{task}.json").read_text())) == results[task]
    files = {*(f"{t}.json" for t in TASKS), "results.json", "run.json", "timing.json", "samples", "journal"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert read_results(tmp_path)["needle"].records == results["needle"].records


def test_every_task_is_complete(tokenizer: Any, text: Path) -> None:
    model = zoo.create("hybrid", layout="attention,gla", vocab_size=258, max_position_embeddings=2048)
    for task in registry.names("evals"):
        family = registry.load("evals", task)
        if "examples" in family.NEEDS:
            continue
        result = run(model, tokenizer, text, tasks=[task], options={**SMALL, "key_value": {"pairs": [3]}})[task]
        assert (result.task, result.version) == (task, family.VERSION)
        assert result.rows and result.seconds > 0 and result.dtype == "float32"
        assert {"cpu", "gpu", "torch", "transformers"} <= set(result.hardware)
        assert all(math.isfinite(row.value) for row in result.rows)
        assert "Example" in (family.__doc__ or "")


def test_a_result_is_saved_as_its_task_ends(llama: Any, tokenizer: Any, text: Path, tmp_path: Path) -> None:
    bad = {**SMALL, "needle": {"samples": 0}}
    with pytest.raises(ZooError, match="samples was 0"):
        run(llama, tokenizer, text, tasks=["perplexity", "needle"], out=tmp_path, options=bad)
    assert list(read_results(tmp_path / "results.json")) == ["perplexity"]


def test_nothing_is_written_when_the_input_is_bad(llama: Any, tokenizer: Any, text: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tasks": ["perplexity", "nedle"]}, "did you mean needle"),
        ({"tasks": []}, "no tasks"),
        ({"data": tmp_path / "none.txt"}, "does not exist"),
        ({"data": None}, "pass --data"),
        ({"lengths": [600, 4096]}, "beyond the model's 2048"),
        ({"teacher": None}, "pass --teacher"),
        ({"tokenizer": None}, "needs a tokenizer"),
        ({"options": {"perplexity": {"size": 3}}}, "no option 'size'; its options are: data, length, windows"),
    ]
    out = tmp_path / "out"
    for change, message in cases:
        arguments = {"tokenizer": tokenizer, **change}
        with pytest.raises(ZooError, match=message) as caught:
            run(llama, arguments.pop("tokenizer"), text, out=out, **arguments)
        assert "\n" not in str(caught.value)
    assert not out.exists()


def test_names_are_loaded(monkeypatch: Any, llama: Any, tokenizer: Any, text: Path) -> None:
    loading = ModuleType("zoo.loading")
    asked: list[str] = []
    loading.from_pretrained = lambda name, **_: asked.append(name) or llama  # type: ignore[attr-defined]
    loading.tokenizer = lambda name: asked.append(f"{name}'s words") or tokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zoo.loading", loading)
    results = evaluate("a", tasks=["fidelity"], teacher="b", data=text, options=SMALL, progress=False)
    assert asked == ["a", "a's words", "b"]
    assert results["fidelity"].model == "a"


def test_the_package_exports_it() -> None:
    assert zoo.evaluate is evaluate


def test_wilson_against_known_values() -> None:
    assert wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10)[1] == 1.0
    row = proportion("accuracy", [True] * 9 + [False], {"length": 3})
    assert (row.value, row.stderr) == pytest.approx((0.9, math.sqrt(0.09 / 10)))


def test_means_and_their_exponential() -> None:
    row = mean_row("nll", [1.0, 2.0, 3.0])
    assert (row.value, row.n, row.stderr) == (2.0, 3, pytest.approx(1 / math.sqrt(3)))
    grown = exponential("perplexity", row)
    assert grown.value == pytest.approx(math.e**2) and grown.stderr == pytest.approx(math.e**2 / math.sqrt(3))
    assert mean_row("nll", [1.0]).stderr is None
    assert curve([row], lambda _: 5.0)["low"][0] < 2.0 < curve([row], lambda _: 5.0)["high"][0]


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": math.nan})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_foreign_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="does not exist"):
        read_results(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ZooError, match="not a results file"):
        read_results(tmp_path / "list.json")
    newer = Result("needle", 1, "m", (Row("accuracy", 1.0),)).to_dict() | {"schema_version": 99}
    with pytest.raises(ZooError, match="schema version 99"):
        Result.from_dict(newer)
    with pytest.raises(ZooError, match="metrics are: accuracy"):
        Result("needle", 1, "m", (Row("accuracy", 1.0),)).value("kl")
