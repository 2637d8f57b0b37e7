"""`zoo calibrate` and the files that it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sparse_models import ids
from typer.testing import CliRunner

import zoo
from zoo import registry
from zoo.architectures.core import methods
from zoo.architectures.core.sparse import View
from zoo.cli import app
from zoo.errors import ZooError


def calibrate(view: View, args: Any) -> dict[str, Any]:
    """A number that tells the layer's queries, keys and values apart, as a budget."""
    assert not view.decoding and view.k.shape[1] == view.q.shape[1]
    return {"budget": 16 + int(1000 * view.k.abs().mean() + 1000 * view.q.abs().mean()) % 16}


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A text file; `quest` has something to calibrate."""
    monkeypatch.setattr(registry.load("mixers", "quest"), "calibrate", calibrate, raising=False)
    (tmp_path / "book.txt").write_text("It was a dark night, and the wind had risen. " * 20)
    return tmp_path


def call(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.mark.parametrize("kind", ["foreign", "ours"])
def test_calibration_makes_a_file_that_loads(kind: str, calibrated: Path, tiny_llama: Path) -> None:
    path = tiny_llama
    if kind == "ours":
        path = zoo.save(zoo.from_pretrained(path), calibrated / "ours", tokenizer=zoo.tokenizer(path))
    given = ("--data", calibrated / "book.txt", "--length", 64, "--samples", 3, "--args", '{"page": 16}')
    done = call("calibrate", path, "--method", "quest", "-o", calibrated / "quest.json", *given)
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert done.stdout == f"wrote {calibrated / 'quest.json'}: quest in 4 of 4 layers\n"
    data = json.loads((calibrated / "quest.json").read_text())
    assert (data["method"], data["source"], data["args"]) == ("quest", str(path), {"page": 16})
    assert data["samples"] == {"rows": 3, "tokens": 64}
    budgets = [layer["budget"] for layer in data["layers"]]
    assert len(budgets) == 4 and len(set(budgets)) > 1
    files = [calibrated / "quest.json", str(calibrated / "quest.json")]
    for attention in files:
        model = zoo.from_pretrained(path, attention=attention, dense_layers=[1])
        if kind == "ours":
            args = [layer.mixer_args for layer in model.config.decoder_config.layers]
            assert [each.get("budget") for each in args] == [budgets[0], None, *budgets[2:]]
            assert args[0]["page"] == 16
        assert model(ids).logits.isfinite().all()
    again = call("calibrate", path, "--method", "quest", "-o", calibrated / "quest.json", *given)
    assert again.exit_code == 2 and "exists" in again.stderr


def test_both_kinds_of_model_calibrate_alike(calibrated: Path, tiny_llama: Path) -> None:
    from zoo.architectures.core.calibration import calibrate as run

    choice = methods.Choice.parse("quest", {"page": 16})
    load = partial(zoo.from_pretrained, attention="quest", attention_args={"page": 16})
    ours = zoo.save(zoo.from_pretrained(tiny_llama), calibrated / "ours")
    seen: list[int] = []
    found = [run(load(path), choice, ids, seen.append) for path in (tiny_llama, ours)]
    assert found[0] == found[1] and seen == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "two_phase"), "no training-free method"),
        (("--method", "quest+quest"), "one method is calibrated at a time"),
        (("--method", "quest", "--args", "{"), "must be a JSON object"),
        (("--method", "quest", "--args", '{"pages": 2}'), "no option 'pages'"),
        (("--method", "quest", "--samples", 0), "--samples was 0"),
    ],
)
def test_calibration_refuses(arguments: Any, words: str, calibrated: Path, tiny_llama: Path) -> None:
    where = ("--data", calibrated / "book.txt", "-o", calibrated / "out.json")
    done = call("calibrate", tiny_llama, *arguments, *where)
    assert (done.exit_code, done.stdout) == (2, "") and words in done.stderr, done.stderr
    assert not (calibrated / "out.json").exists()


def test_a_method_without_anything_to_calibrate(tiny_llama: Path, tmp_path: Path) -> None:
    name = next(name for name in methods.names() if not hasattr(registry.load("mixers", name), "calibrate"))
    done = call("calibrate", tiny_llama, "--method", name, "--data", tmp_path / "x", "-o", tmp_path / "o.json")
    assert done.exit_code == 2 and "nothing to calibrate" in done.stderr


def test_a_calibration_of_another_model(calibrated: Path, checkpoints: Any) -> None:
    file = calibrated / "other.json"
    file.write_text(json.dumps({"method": "quest", "layers": [{"budget": 16}] * 5}))
    with pytest.raises(ZooError, match="has 5 layers, the model 3"):
        zoo.from_pretrained(checkpoints("llama"), attention=file)
    file.write_text(json.dumps({"method": "quest"}))
    with pytest.raises(ZooError, match="no calibration file"):
        zoo.from_pretrained(checkpoints("llama"), attention=file)


def test_the_options_of_a_user_win_over_those_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "quest.json"
    file.write_text(json.dumps({"method": "quest", "args": {"page": 32}, "layers": [{"budget": 16}, None]}))
    [part] = methods.Choice.parse(file, {"budget": 0.5}).parts
    assert part.options(0) == {"page": 32, "budget": 0.5} and part.options(1) is None
    assert replace(part, own={}).options(0) == {"page": 32, "budget": 16}
