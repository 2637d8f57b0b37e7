"""What a model answered outlives a kill, belongs to that model alone, and is the same on one process or two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.evals.core import journal
from zoo.evals.core.requests import LogLikelihood, Predict, counting, outputs

SCRIPT = """
import json, os, signal, sys, torch, zoo
from pathlib import Path
from zoo.evals.core import journal, processes, requests
torch.set_num_threads(1)
torch.manual_seed(0)
model = zoo.create("hybrid")
asked = [requests.LogLikelihood(ids) for ids in json.loads(Path(sys.argv[2]).read_text())]
batches = []
def run(model, batch):
    batches.append(batch)
    if sys.argv[3] == "kill" and len(batches) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return requests.RUNS["loglikelihood"](model, batch)
with processes.joined(), journal.opened(Path(sys.argv[1]), "n", model):
    requests.outputs(model, asked[:9], batch_tokens=100, run=run)
    found = requests.outputs(model, asked, batch_tokens=100, run=run)
    Path(sys.argv[1], f"out.{processes.rank()}").write_text(json.dumps(found))
"""


def rows(model: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    sizes = (24, 24, 24, 32, 32, 40) * 5
    return [torch.randint(model.config.vocab_size, (size,), generator=generator).tolist() for size in sizes]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return zoo.create("hybrid")


@pytest.fixture(scope="module")
def asked(model: Any) -> list[LogLikelihood]:
    return [LogLikelihood(ids) for ids in rows(model)]


@pytest.fixture(scope="module")
def whole(model: Any, asked: list[LogLikelihood]) -> list[Any]:
    return [*outputs(model, asked[:9], batch_tokens=100), *outputs(model, asked, batch_tokens=100)][9:]


def child(folder: Path, model: Any, mode: str, *launcher: str) -> int:
    import json

    (folder / "rows.json").write_text(json.dumps(rows(model)))
    (folder / "script.py").write_text(SCRIPT)
    arguments = [str(folder / "script.py"), str(folder), str(folder / "rows.json"), mode]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, *arguments], env=environment, cwd=Path(zoo.__file__).parent.parent, timeout=120
    ).returncode


def test_a_killed_run_ends_with_the_same_bits(
    model: Any, asked: list[LogLikelihood], whole: list[Any], tmp_path: Path
) -> None:
    assert child(tmp_path, model, "kill") == -signal.SIGKILL
    path = tmp_path / "n.0.jsonl"
    kept = path.read_bytes()
    assert 0 < kept.count(b"\n") < len(asked)
    path.write_bytes(kept[:-20])  # as if the kill had come in the middle of a line
    runs: list[int] = []
    with journal.opened(tmp_path, "n", model):
        outputs(model, asked[:9], batch_tokens=100)
        assert outputs(model, asked, batch_tokens=100) == whole
    with journal.opened(tmp_path, "n", model):
        assert outputs(model, asked, batch_tokens=100, run=lambda *_: runs.append(1) or []) == whole
    assert not runs


@pytest.mark.slow
def test_two_processes_answer_as_one(model: Any, asked: list[LogLikelihood], whole: list[Any], tmp_path: Path) -> None:
    import json

    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    assert child(tmp_path, model, "run", *launcher) == 0
    for rank in (0, 1):
        assert json.loads((tmp_path / f"out.{rank}").read_text()) == whole
    shares = [(tmp_path / f"n.{rank}.jsonl").read_text().count("\n") for rank in (0, 1)]
    assert min(shares) > 0 and sum(shares) < 2 * len(asked)


def test_a_journal_answers_for_its_own_model_as_it_is(model: Any, asked: list[LogLikelihood], tmp_path: Path) -> None:
    torch.manual_seed(1)
    teacher = zoo.create("hybrid")
    fresh = outputs(teacher, asked[:2])
    with journal.opened(tmp_path, "n", model):
        own = outputs(model, asked[:2])
        assert outputs(teacher, asked[:2]) == fresh != own
        blank = [request.blank for request in asked[:2]]
        assert outputs(model, asked[:2], variant="without branch/", run=lambda *_: blank) == blank
        assert outputs(model, asked[:2]) == own


def test_batches_change_nothing(asked: list[LogLikelihood]) -> None:
    for architecture in ("transformer", "hybrid", "mamba2"):
        torch.manual_seed(0)
        model = zoo.create(architecture)
        some = [LogLikelihood([token % model.config.vocab_size for token in request.ids]) for request in asked]
        found = [outputs(model, some, batch_tokens=40 * size) for size in (1, 4, 16)]
        assert [output["greedy"] for output in found[0]] == [output["greedy"] for output in found[2]]
        flat = [torch.tensor([value for output in each for value in output["logprobs"]]) for each in found]
        torch.testing.assert_close(flat[1], flat[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(flat[2], flat[0], rtol=0, atol=2e-6)


def test_counting_runs_nothing(model: Any, asked: list[LogLikelihood]) -> None:
    with counting() as counted:
        found = outputs(model, [*asked, Predict([1, 2, 3], (0, 2))], run=lambda *_: 1 / 0)  # type: ignore[arg-type,return-value]
    assert len(counted) == len(asked) + 1 and found[-1] == [0, 0]
    assert len(found[0]["logprobs"]) == len(asked[0].ids) - 1
