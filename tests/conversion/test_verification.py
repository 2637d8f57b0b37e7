"""`zoo verify`: what only a run shows, each broken here on purpose, and the page."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.checkpoint import Checkpoint
from zoo.architectures.core.load import from_pretrained
from zoo.architectures.core.mixer import Context
from zoo.cli import app
from zoo.conversion.core import models
from zoo.conversion.core.convert import convert
from zoo.conversion.core.heal import heal
from zoo.conversion.core.verification import planned, verify
from zoo.conversion.core.verify_runs import decode, kernels, padding
from zoo.errors import ZooError
from zoo.kernels.delta_rule import BACKENDS

AT_CONVERSION = ["tensors", "identity", "expansion", "window", "reload", "tokenizer"]
RUNS = ["kernels", "decode", "padding", "similarity", "branches"]


@pytest.fixture(scope="module")
def hybrid(hard_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of a recurrence, one kept, one of a window."""
    out = tmp_path_factory.mktemp("hybrid") / "out"
    convert(hard_llama, out, layout="gated_delta_net,attention,attention(window=8,sinks=1)", fresh_process=False)
    return out


@pytest.fixture(scope="module")
def checks(hybrid: Path) -> dict[str, Any]:
    return verify(hybrid, fresh_process=False)


def test_a_conversion_passes_and_its_checks_are_those_of_convert(checks: dict[str, Any], hybrid: Path) -> None:
    assert list(checks) == [*AT_CONVERSION, *RUNS]
    at_conversion = json.loads((hybrid / "verification.json").read_text())["checks"]
    assert {name: checks[name] for name in AT_CONVERSION} == at_conversion
    unjudged = {"reload", "similarity", "branches"}
    assert all(checks[name]["passed"] is True for name in {*AT_CONVERSION, *RUNS} - unjudged)
    assert {"0 chunked", "2 chunked"} <= checks["kernels"]["layers"].keys()


def test_branches_are_the_kl_without_them(checks: dict[str, Any], hybrid: Path, hard_llama: Path) -> None:
    """Against transformers' teacher, and a student whose output projection is zero."""
    row = models.sample_ids(planned(hybrid), 64)[:1]
    teacher = LlamaForCausalLM.from_pretrained(hard_llama, dtype=torch.float32).eval()
    student = from_pretrained(hybrid, dtype=torch.float32)

    def kl() -> float:
        with torch.no_grad():
            p, q = (m(row[:, :-1], use_cache=False).logits[0].double().log_softmax(-1) for m in (teacher, student))
        return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))

    found = checks["branches"]
    assert found["kl"] == pytest.approx(kl(), rel=1e-4)
    projection = student.model.layers[0].mixer.o_proj
    torch.nn.init.zeros_(projection.weight)
    torch.nn.init.zeros_(projection.bias)
    assert found["layers"]["0"]["whole"] == pytest.approx(kl(), rel=1e-4)


def test_a_window_in_place_of_a_window_changes_nothing(hard_llama: Path, tmp_path: Path) -> None:
    convert(hard_llama, tmp_path / "out", layout="attention(window=16,sinks=1),attention*2", fresh_process=False)
    found = verify(tmp_path / "out", fresh_process=False)
    branches, similar = found["branches"], found["similarity"]["layers"]["0"]
    assert branches["window"] == 16 and branches["layers"]["0"]["window"] == pytest.approx(branches["kl"], rel=1e-4)
    assert 0 < similar["error_before"] < 1 and 0 < similar["cosine_before"] < 1


def test_every_mixer_inside_a_mixer_is_a_branch(hard_llama: Path, tmp_path: Path) -> None:
    convert(hard_llama, tmp_path / "out", mixer="gla", keep=[0, 2], keep_heads={1: [0, 3]}, fresh_process=False)
    found = verify(tmp_path / "out", fresh_process=False)["branches"]
    assert found["layers"]["1"].keys() == {"whole", "softmax", "other", "window"}
    student = from_pretrained(tmp_path / "out", dtype=torch.float32)
    row, teacher = models.sample_ids(planned(tmp_path / "out"), 64)[:1, :-1], from_pretrained(hard_llama)
    student.model.layers[1].mixer.o_proj.weight.data[:, 2 * 16 :] = 0  # columns of the heads beside the two kept ones
    with torch.no_grad():
        p, q = (m(row, use_cache=False).logits[0].double().log_softmax(-1) for m in (teacher, student))
    expected = float(F.kl_div(q, p, log_target=True, reduction="batchmean"))
    assert found["layers"]["1"]["other"] == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the old man by the river inn " * 400)
    return file


@pytest.fixture(scope="module")
def healed(hybrid: Path, hard_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("healed") / "out"
    sizes = {"length": 16, "batch_size": 8, "progress": False, "device": "cpu", "data": str(text)}
    heal(hard_llama, hybrid, out, align_tokens=2560, distill_tokens=0, **sizes)
    return out


def test_a_trained_branch_that_does_nothing_fails(healed: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(healed, tmp_path / "out")
    dead = from_pretrained(healed)
    torch.nn.init.zeros_(dead.model.layers[0].mixer.o_proj.weight)
    torch.nn.init.zeros_(dead.model.layers[0].mixer.o_proj.bias)
    dead.save_pretrained(tmp_path / "out")
    found = verify(tmp_path / "out", data=text, fresh_process=False)["branches"]
    assert found["passed"] is False and "0 whole" in found["dead"]
    assert found["layers"]["0"]["whole"] == found["kl"]


# ---- broken on purpose ----------------------------------------------------------------------------------------------
def failed(folder: Path) -> dict[str, dict[str, float]]:
    """The runs that fail, with their errors."""
    plan = planned(folder)
    ids, model = models.sample_ids(plan, 64), models.load(folder, torch.float64)
    hidden = models.mixer_inputs(plan, ids, whole=True)
    found = {
        "kernels": kernels(plan, Checkpoint(folder), hidden),
        "decode": decode(plan, model, ids),
        "padding": padding(model, ids),
    }
    return {name: check["layers"] for name, check in found.items() if not check["passed"]}


def test_a_kernel_that_differs_is_found(hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunked = BACKENDS["chunked"]

    def wrong(*args: Any) -> Any:
        o, state = chunked.run(*args)
        return o * (1 + 1e-4), state

    monkeypatch.setitem(BACKENDS, "chunked", type(chunked)("chunked", chunked.supports, wrong))
    found = failed(hybrid)["kernels"]
    assert found["0 chunked"] > 1e-5 and found["2 chunked"] < 1e-10


def test_a_state_that_is_lost_between_calls_is_found(hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = LayerCache.put
    monkeypatch.setattr(LayerCache, "put", lambda self, name, x, *a: put(self, name, x * (name != "state"), *a))
    assert list(failed(hybrid)) == ["decode"]


def test_padding_that_reaches_a_state_is_found(hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "mask", lambda self, x: x)
    assert list(failed(hybrid)) == ["padding"]


# ---- the command ----------------------------------------------------------------------------------------------------
class Cells(HTMLParser):
    """Tags that were opened and closed in order, and the headings."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += [data.strip()] if data.strip() else []


def test_the_command_on_a_trained_model(healed: Path, text: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(healed), "--data", str(text), "--report", str(tmp_path)])
    written = json.loads((tmp_path / "verification.json").read_text())
    found = written["checks"]
    assert written["ok"] is (result.exit_code == 0) is (not found["branches"]["dead"]), result.output
    assert found["branches"]["passed"] is written["ok"] and found["expansion"]["passed"] is None
    for name in ("tensors", "identity", "reload", "kernels", "decode", "padding"):
        assert found[name]["passed"] is True, name
    aligned = found["similarity"]["layers"]["0"]
    assert aligned["error_after"] < 0.9 * aligned["error_before"]
    assert aligned["cosine_after"] > aligned["cosine_before"]
    page, parser = (tmp_path / "verification.html").read_text(), Cells()
    parser.feed(page)
    assert parser.open == [] and f"Verification of {healed.name}" in parser.text
    assert f"{found['branches']['layers']['0']['whole']:.4g}" in parser.text
    assert not re.search(r"<script|https?://", page)
    assert {path.name for path in tmp_path.iterdir()} == {"verification.json", "verification.html"}


def test_a_changed_checkpoint_fails_and_says_so(hybrid: Path, tmp_path: Path) -> None:
    shutil.copytree(hybrid, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file(
        {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, tmp_path / "out" / "model.safetensors"
    )
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "out")])
    assert result.exit_code == 1 and "model.norm.weight" in result.stdout
    assert json.loads((tmp_path / "out" / "verification.json").read_text())["ok"] is False
    assert "model.norm.weight" in (tmp_path / "out" / "verification.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "nothing"}, "has no zoo_conversion.json"),
        ({"data": "nothing.txt"}, "'nothing.txt' does not exist"),
        ({"source": "nothing"}, "nothing"),
        ({"report": "nothing"}, "report was nothing; it must be a directory that exists"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, str], message: str, hybrid: Path) -> None:
    with pytest.raises(ZooError, match=message) as caught:
        verify(**{"out": hybrid, "fresh_process": False, **change})
    assert "\n" not in str(caught.value)
