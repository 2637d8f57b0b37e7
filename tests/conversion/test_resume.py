"""A conversion that was killed goes on: the same bytes in the end, and never those of another conversion."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.conversion.core import convert as module
from zoo.conversion.core.convert import convert
from zoo.conversion.core.planner import Plan
from zoo.errors import ZooError

OPTIONS: dict[str, Any] = {"layout": "gated_delta_net,gla,attention", "max_shard_size": "40KB", "fresh_process": False}
# a child ends itself by SIGKILL at its n-th change of a file or, from `tensors` on, at its n-th tensor
DRIVER = """
import json, os, signal, sys
from zoo.conversion.core.convert import convert
from zoo.conversion.core.planner import Plan

source, out, moments, options = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
count = 0

def kill_at(number):
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)

def child(kind, number):
    def hook(event, args):
        write = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (write or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")) and out in str(args[0]):
            kill_at(number)
    if kind == "change":
        sys.addaudithook(hook)
    else:
        tensor = Plan.tensor
        Plan.tensor = lambda self, name: (kill_at(number), tensor(self, name))[1]
    convert(source, out, **options)

convert(source, out, dry_run=True, **options)
from transformers import AutoTokenizer, LlamaForCausalLM  # imported once, not by every child

for kind, number in moments:
    pid = os.fork()
    if pid == 0:
        child(kind, number)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    print(json.dumps([os.WIFSIGNALED(status), sorted(os.listdir(os.path.dirname(out)))]), flush=True)
    if not os.WIFSIGNALED(status):
        break
"""


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run_killed(source: Path, out: Path, moments: list[tuple[str, int]]) -> list[Any]:
    """What the directory around `out` held after each kill."""
    out.parent.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(zoo.__file__).parent.parent)}
    given = [str(source), str(out), json.dumps(moments), json.dumps(OPTIONS)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *given], env=environment, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def whole(hard_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversion without a kill."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(hard_llama, out, **OPTIONS)
    return out


def test_a_conversion_killed_again_and_again_gives_the_same_bytes(
    hard_llama: Path, whole: Path, tmp_path: Path
) -> None:
    moments = [*(("change", n) for n in (2, 3)), ("tensor", 3), *(("change", n) for n in (6, 9, 14, 19, 25))]
    seen = run_killed(hard_llama, tmp_path / "runs" / "out", [*moments, ("tensor", 10**6)])
    assert [killed for killed, _ in seen] == [True] * len(moments) + [False]
    assert all(names == ["out.partial"] for _, names in seen[:-1]) and seen[-1][1] == ["out"]
    assert hashes(tmp_path / "runs" / "out") == hashes(whole)
    assert len(list(whole.glob("*.safetensors"))) > 5


def stopped(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tensors: int = 30, **options: Any) -> Path:
    """Ctrl-C at a tensor; the directory that is left."""
    count, make = [0], Plan.tensor

    def counted(self: Plan, name: str) -> Any:
        count[0] += 1
        if count[0] > tensors:
            raise KeyboardInterrupt
        return make(self, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Plan, "tensor", counted)
        convert(source, out, **{**OPTIONS, **options})
    return out.with_name(f"{out.name}.partial")


def test_finished_shards_are_not_written_again_unless_their_hash_is_wrong(
    hard_llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = stopped(hard_llama, tmp_path / "out", monkeypatch)
    finished = [left / "checkpoint" / name for name in json.loads((left / "finished.json").read_text())["finished"]]
    assert len(finished) > 2
    spoiled, *kept = finished
    data = bytearray(spoiled.read_bytes())
    data[-1] ^= 1
    spoiled.write_bytes(data)
    before = {file.name: file.stat().st_ino for file in kept}
    made: list[str] = []
    make = Plan.tensor
    monkeypatch.setattr(Plan, "tensor", lambda self, name: (made.append(name), make(self, name))[1])
    monkeypatch.setattr(module, "run_checks", lambda *args, **options: made.append("checks") or {})
    convert(hard_llama, tmp_path / "out", **OPTIONS)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {index[name] for name in made[: made.index("checks")]} == set(index.values()) - set(before)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in before} == before
    weights = {name: digest for name, digest in hashes(whole).items() if name.endswith(".safetensors")}
    assert weights.items() <= hashes(tmp_path / "out").items()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"layout": "gla,gla,attention"}, r"layer 0 was 'gated_delta_net \{\}' and is now 'gla \{\}'"),
        ({"layout": "gated_delta_net(beta_scale=2.0),gla,attention"}, "layer 0 was"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"max_shard_size": "41KB"}, "max_shard_size was 40000 and is now 41000"),
    ],
)
def test_another_plan_does_not_go_on(
    changed: dict[str, Any], reason: str, hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = stopped(hard_llama, tmp_path / "out", monkeypatch)
    before = hashes(left)
    with pytest.raises(ZooError, match=f"unfinished conversion whose {reason}"):
        convert(hard_llama, tmp_path / "out", **{**OPTIONS, **changed})
    assert hashes(left) == before and not (tmp_path / "out").exists()


def test_another_source_does_not_go_on(make_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, other = make_llama(), make_llama()
    stopped(source, tmp_path / "out", monkeypatch)
    with pytest.raises(ZooError, match="whose source was '.*llama0' and is now '.*llama1'"):
        convert(other, tmp_path / "out", **OPTIONS)
    os.replace(other / "model.safetensors", source / "model.safetensors")
    with pytest.raises(ZooError, match=r"whose source file model.safetensors was '\d+ bytes"):
        convert(source, tmp_path / "out", **OPTIONS)


def test_nothing_is_left_where_nothing_is_finished_or_a_check_fails(
    hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(hard_llama, tmp_path / "new" / "out", monkeypatch, tensors=1)
    assert list(tmp_path.iterdir()) == []

    def fail(*args: Any, **options: Any) -> Any:
        raise ZooError("a check failed")

    monkeypatch.setattr(module, "run_checks", fail)
    with pytest.raises(ZooError, match="a check failed"):
        convert(hard_llama, tmp_path / "new" / "out", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_stays_and_two_do_not_write_at_once(
    hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    with pytest.raises(ZooError, match="in the way"):
        convert(hard_llama, tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"

    def again(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        with pytest.raises(ZooError, match="written by another process"):
            convert(hard_llama, tmp_path / "two", **OPTIONS)
        return {}

    monkeypatch.setattr(module, "run_checks", again)
    convert(hard_llama, tmp_path / "two", **OPTIONS)
