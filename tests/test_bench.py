"""`zoo bench kernels` without a GPU: what it measures, what it refuses to time, what it writes and concludes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import zoo
from zoo import registry
from zoo.cli import app
from zoo.commands import bench, bench_cases, bench_peers, bench_tune
from zoo.commands.bench_cases import Case

COLUMNS = "op variant B T H D dtype direction zoo_ms peer peer_ms floor_ms zoo_gib peer_gib gpu torch triton commit"
# sequential, or without a peer and a kernel of their own
UNTIMED = {"slstm", "test_time_training", "block_sparse_attention"}


@pytest.fixture(autouse=True)
def _own_commit(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ZOO_COMMIT", "abc")
    caches = (bench.machine, bench.judged)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def call(*args: object) -> Result:
    return CliRunner().invoke(app, ["bench", "kernels", *map(str, args)])


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def wrong_scan(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """From here on, scan is off by a factor in everything but fp64."""
    right = registry.get("kernels", "scan", "scan")

    def scan(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        h, state = right(x, *args, **options)
        return h if x.dtype == torch.float64 else h * factor, state

    monkeypatch.setattr(bench_cases, "function", lambda case: scan)


def test_rows_plot_and_table(tmp_path: Path) -> None:
    file = tmp_path / "kernels.csv"
    done = call("--op", "scan,attention", "--dtype", "float32", "--against", "sdpa", "--out", file)
    assert done.exit_code == 0, (done.output, done.exception)
    found = rows(file)
    assert set(COLUMNS.split()) <= set(found[0])
    assert {(row["op"], row["options"], row["direction"]) for row in found} == {
        *(("scan", "", way) for way in ("fwd", "fwdbwd")),
        *(("attention", options, way) for way in ("fwd", "fwdbwd") for options in ("", "window=32")),
    }
    for row in found:
        assert row["check"] == "ok" and row["commit"] == "abc" and row["torch"] == torch.__version__
        assert float(row["zoo_ms"]) > 0 and float(row["floor_ms"]) > 0
        assert (row["peer"], bool(row["peer_ms"])) == (
            ("sdpa", True) if row["op"] + row["options"] == "attention" else ("", False)
        )
    assert file.with_suffix(".png").stat().st_size > 1000
    assert "times faster" in done.output and "geometric mean" in done.output


def test_a_row_of_this_commit_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda case, *rest: measured.append(case.direction) or measure(case, *rest))
    file = tmp_path / "kernels.csv"
    common = ("--op", "scan", "--dtype", "float32", "--out", file)
    call(*common, "--direction", "fwd")
    first = rows(file)
    call(*common)
    assert measured == ["fwd", "fwdbwd"] and rows(file)[:1] == first
    for commit, times in (("def", 4), ("def", 4), ("def+", 6), ("def+", 8)):
        monkeypatch.setenv("ZOO_COMMIT", commit)
        bench.machine.cache_clear()
        call(*common)
        assert len(measured) == times, f"{commit}: files that changed have no name"
    assert len(rows(file)) == 2


def test_what_is_wrong_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_scan(monkeypatch, 1.001)
    done = call("--op", "scan", "--dtype", "float32", "--out", tmp_path / "kernels.csv")
    assert done.exit_code == 1
    for row in rows(tmp_path / "kernels.csv"):
        assert "output0 1.0e-03" in row["check"] and "dx" in row["check"]
        assert not row["zoo_ms"]


def test_what_raises_ends_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case) -> Any:
        raise RuntimeError("out of\nregisters")

    monkeypatch.setattr(bench_cases, "function", broken)
    done = call("--op", "scan", "--dtype", "float32", "--out", tmp_path / "kernels.csv")
    assert done.exit_code == 1
    assert {row["check"] for row in rows(tmp_path / "kernels.csv")} == {"RuntimeError: out of registers"}


@pytest.mark.parametrize("case", [c for c in bench_cases.cases(False, "float32") if c.direction != "fwd"], ids=str)
def test_every_op_passes_its_gate(case: Case) -> None:
    assert bench_cases.gate(case, "cpu") == []


def test_the_tolerances_see_zeros_and_one_wrong_element() -> None:
    want = {"output0": torch.randn(1000), "dx": torch.zeros(3)}
    for change in (lambda x: x * 0, lambda x: torch.cat([x[:1] + 1, x[1:]]), lambda x: x * torch.nan):
        have = want | {"output0": change(want["output0"])}
        assert len(bench_cases.faults(bench_cases.errors(have, want), torch.bfloat16)) == 1
    assert bench_cases.faults(bench_cases.errors(want, want), torch.float32) == []


def test_every_op_and_shape_of_the_bars_is_measured() -> None:
    cases = bench_cases.cases(True)
    assert {case.op for case in cases} == set(zoo.list("kernels")) - UNTIMED
    for op, variant in bench_peers.FLA:
        for width in (64,) if op == "dplr" else (64, 128):
            found = {(c.B, c.T, c.H, c.direction) for c in cases if (c.op, c.variant, c.D) == (op, variant, width)}
            heads = 2048 // width
            shapes = ((8, 2048, heads), (2, 8192, heads), (1, 32768, heads), (1, 8192, heads // 2))
            assert {(*shape, way) for shape in shapes for way in ("fwd", "fwdbwd")} <= found
    decoded = {(c.op, c.B, c.T, c.H, c.D) for c in cases if c.direction == "decode"}
    assert decoded == {(op, 64, 1, 16, 128) for op in ("linear_attention", "delta_rule", "dplr")}
    assert {c.variant for c in cases} <= {"head", "token", "channel", "none"}


def test_floors() -> None:
    case = Case("linear_attention", "none", 2, 128, 4, 16)
    made = bench_cases.tensors(case, "cpu")
    one = 2 * 128 * 4 * 16 * 2  # bytes of q, of k, of v and of o
    assert bench_cases.traffic(case, made) == 4 * one
    assert bench_cases.operations(case) == 4 * 2 * 128 * 4 * 16 * 16
    step = Case("delta_rule", "token", 2, 1, 4, 16, direction="decode")
    assert bench_cases.traffic(step, bench_cases.tensors(step, "cpu")) == 2 * (2 * 4 * 16 * 16 * 4)
    window = Case("attention", "none", 1, 8, 1, 16, options="window=3")
    assert bench_cases.operations(window) == 2 * (1 + 2 + 3 * 6) * 32


def test_peers_are_given_every_tensor_and_only_for_what_they_can() -> None:
    for (op, variant), (_, renamed, _) in bench_peers.FLA.items():
        assert set(renamed) <= set(bench_cases.tensors(Case(op, variant, 1, 2, 1, 4), "cpu"))
    assert bench_peers.names(Case("mlstm", "token", 1, 2, 1, 4), ["fla", "sdpa"]) == []
    assert bench_peers.names(Case("attention", "none", 1, 2, 1, 4), ["flex", "sdpa"]) == ["sdpa"]
    assert bench_peers.names(Case("attention", "none", 1, 2, 1, 4, options="window=1"), ["flex", "sdpa"]) == ["flex"]


def test_summary_against_the_bars() -> None:
    def row(way: str, zoo_ms: float, peer_ms: float, gib: float = 1.0) -> dict[str, str]:
        numbers = {"zoo_ms": zoo_ms, "peer_ms": peer_ms, "floor_ms": 1.0, "zoo_gib": gib, "peer_gib": 1.0}
        named = {"op": "delta_rule", "variant": "none", "direction": way, "peer": "fla"}
        return named | {name: str(number) for name, number in numbers.items()}

    [said] = bench.summary([row("fwd", 1.0, 1.2), row("fwd", 1.0, 3.0), row("fwd", 1.0, 2.0)])
    assert said[4:] == ("1.93", "1.20", "1.00", ">= 1.5", "yes")
    assert bench.summary([row("fwd", 1.0, 0.9), row("fwd", 1.0, 9.0)])[0][-1] == "no"  # a cell below 1.0
    assert bench.summary([row("fwdbwd", 1.0, 1.4, gib=1.1)])[0][-1] == "no"  # more memory
    assert bench.summary([row("decode", 1.25, 4.0)])[0][4:] == ("1.25 x floor", "", "", "<= 1.3", "yes")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--op", "scam"), "scam"),
        (("--op", "scan/token"), "scan/token"),
        (("--dtype", "int8"), "int8"),
        (("--direction", "bwd"), "bwd"),
        (("--against", "cudnn"), "cudnn"),
        (("--tune",), "needs a GPU"),
    ],
)
def test_refusals(args: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    done = call(*args, *([] if args == ("--tune",) else ["--out", tmp_path / "kernels.csv"]))
    [line] = done.stderr.splitlines()
    assert (done.exit_code, done.stdout, list(tmp_path.iterdir())) == (2, "", []) and reason in line


def test_only_kernels_are_measured() -> None:
    assert CliRunner().invoke(app, ["bench", "models"]).exit_code == 2


def test_tuning_changes_one_number_at_a_time() -> None:
    choice = {"BV": 64, "num_warps": 4, "num_stages": 2}
    found = list(bench_tune.candidates(choice))
    assert all(sum(other[name] != choice[name] for name in choice) == 1 for other in found)
    assert {other["BV"] for other in found} == {32, 64, 128} and choice not in found


def test_tuning_takes_what_is_faster_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {(4, 1): 10.0, (8, 1): 5.0, (2, 1): 3.0, (8, 2): 4.0, (8, 3): 3.99, (4, 2): 9.0}
    case, entry = Case("scan", "channel", 1, 2, 1, 4), {"num_warps": 4, "num_stages": 1}

    def milliseconds(*_: Any) -> float:
        return times[entry["num_warps"], entry["num_stages"]]  # KeyError: such a choice does not compile

    monkeypatch.setattr(bench_tune, "milliseconds", milliseconds)
    monkeypatch.setattr(bench_tune, "gate", lambda *_: ["wrong"] if entry["num_warps"] == 2 else [])
    assert bench_tune.improve(case, [], entry, 10.0) == 4.0
    assert entry == {"num_warps": 8, "num_stages": 2}


def test_what_was_tuned_is_kept_for_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch: Any = bench_cases.kernels("launch")
    table = {
        "scan.forward": {"64": {"num_warps": 4}, "128": {"num_warps": 8}},
        "scan.backward": {"64": {"num_warps": 4}},
    }
    (tmp_path / "default.json").write_text(json.dumps(table))
    monkeypatch.setattr(launch, "CHOICES", tmp_path)
    monkeypatch.setattr(launch, "family", lambda device: "hopper")
    launch.choices.cache_clear()
    try:
        with bench_tune.asked() as found:
            launch.choice("scan.forward", 60, torch.zeros(1, dtype=torch.bfloat16))["num_warps"] = 2
        assert list(found) == [("scan.forward", "64")]
        bench_tune.keep("scan.forward")
        kept = json.loads((tmp_path / "hopper.json").read_text())
        assert kept == {"scan.forward": {"64": {"num_warps": 2}, "128": {"num_warps": 8}}}
        assert json.loads((tmp_path / "default.json").read_text()) == table
    finally:
        launch.choices.cache_clear()
