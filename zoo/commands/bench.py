"""`zoo bench kernels`: is a kernel right, how long does it take, beside a peer and the least time that is possible.

Every case is checked against the truth before it is timed; one that fails keeps empty times. Rows go to a CSV file one
by one, and those that it holds of the same commit are not measured again.
"""

import csv
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from zoo.commands import bench_cases, bench_peers
from zoo.commands.bench_cases import Case
from zoo.commands.bench_timing import floor, gradients, rotated, short, timed
from zoo.errors import ZooError

KEY = ("op", "options", "variant", "B", "T", "H", "D", "dtype", "direction", "peer")
TIMES = ("zoo_ms", "peer_ms", "floor_ms", "zoo_gib", "peer_gib", "zoo_eager_ms", "peer_eager_ms")
COLUMNS = (*KEY, *TIMES, "backend", "check", "peer_note", "gpu", "torch", "triton", "commit")
BARS = {"fwd": 1.5, "fwdbwd": 1.3}  # times the peer's speed, by variant
DECODE_BAR = 1.3  # times the floor
Row = dict[str, str]


def run(
    ops: list[str] | None, against: list[str], out: Path | None, *, dtype: str = "bfloat16",
    direction: str | None = None, jobs: int | None = None,
) -> list[Row]:  # fmt: skip
    """Measure the cases of `ops` (each OP or OP/VARIANT; all when None) on the GPU, or small ones without one: the rows
    of this run, also written to `out` beside a plot."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = pick(ops, dtype, direction, device)
    table = Table(out or default_file())
    waiting = [(case, peer) for case in chosen for peer in bench_peers.names(case, against) or [""]]
    missing = [(case, peer) for case, peer in waiting if not table.has(case, peer)]
    if device == "cuda":
        warm(missing, os.cpu_count() or 1 if jobs is None else jobs)
        if "fla" in against:
            bench_peers.tune_quickly()
    for case, peer in missing:
        row = table.put(measure(case, peer, device))
        print(f"{case.label}: {' '.join(filter(None, cells(row)[3:]))}", flush=True)
        if "CUDA error" in row["check"] + row["peer_note"]:
            raise ZooError(f"{case.label} broke the GPU's context; run again for the other cases: {row['check']}")
    rows = [table.rows[table.key(case, peer)] for case, peer in waiting]
    plot(rows, table.file.with_suffix(".png"))
    return rows


def pick(ops: list[str] | None, dtype: str, direction: str | None, device: str) -> list[Case]:
    ways, dtypes = ("fwd", "fwdbwd", "decode"), ("bfloat16", "float16", "float32")
    for name, value, known in (("--dtype", dtype, dtypes), ("--direction", direction or "fwd", ways)):
        if value not in known:
            raise ZooError(f"{name} was {value!r}; it must be one of {', '.join(known)}")
    found = bench_cases.cases(device == "cuda", dtype)
    known_ops = {case.op for case in found} | {f"{case.op}/{case.variant}" for case in found}
    if unknown := set(ops or []) - known_ops:
        raise ZooError(f"--op was {', '.join(unknown)}; it must be among {', '.join(sorted(known_ops))}")
    kept = [case for case in found if direction in (None, case.direction)]
    return kept if ops is None else [case for case in kept if {case.op, f"{case.op}/{case.variant}"} & set(ops)]


def measure(case: Case, peer: str, device: str) -> Row:
    row = {name: str(value) for name, value in asdict(case).items()} | machine() | {"peer": peer}
    try:
        # The gate covers forward and backward, at a size that fp64 has room for.
        way = "decode" if case.direction == "decode" else "fwd"
        row["check"], row["backend"] = judged(replace(case, B=1, H=min(case.H, max(1, 2**15 // case.T)), direction=way))
        if row["check"] != "ok":
            return row
        sets = rotated(case, device)
        row["floor_ms"] = short(floor(case, sets[0], device))
        row |= timed(case, bench_cases.caller(case), sets)
    except Exception as error:  # one broken kernel must not end the run
        torch.cuda.empty_cache()
        return row | {"check": _reason(error)}
    if peer:
        try:
            other, row["peer_note"] = bench_peers.load(peer, case)
            row |= timed(case, other, sets, "peer")
        except ZooError:
            raise
        except Exception as error:
            row["peer_note"] = _reason(error)
    return row


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@cache
def judged(case: Case) -> tuple[str, str]:
    """What is wrong with a case, or "ok", and the backend that ran it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names: list[str] = []
    with bench_cases.watched("dispatch", "select", lambda found, *_: names.append(found.name)):
        wrong = bench_cases.gate(case, device)
    return "; ".join(wrong) or "ok", names[0] if names else "step"


def warm(missing: list[tuple[Case, str]], jobs: int) -> None:
    """Fill Triton's cache: every distinct set of kernels in a process of its own, ours and the peer's. Without `jobs`
    each is compiled where it is first measured."""
    if not jobs:
        return
    groups: dict[tuple[Any, ...], tuple[Case, str]] = {}
    for case, peer in missing:
        for who in {"", peer} - {"sdpa", "flex"}:
            same = (case.op, case.variant, case.H, case.D, case.options, case.direction == "decode", who)
            if same not in groups or case.direction == "fwdbwd":
                groups[same] = (case, who)

    def one(entry: tuple[Case, str]) -> None:
        command = [sys.executable, "-m", "zoo.commands.bench", json.dumps(asdict(entry[0])), entry[1]]
        with suppress(subprocess.TimeoutExpired):
            quiet = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, capture_output=True, timeout=560, check=False, env=quiet)

    begin = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        # The peer takes longest: first in, so that no core waits for it at the end.
        list(pool.map(one, sorted(groups.values(), key=lambda entry: entry[1] == "")))
    print(f"compiled {len(groups)} sets of kernels in {time.perf_counter() - begin:.0f} s", flush=True)


def compile_one(case: Case, who: str) -> None:
    """What a process of `warm` does; what fails here will say so where it is measured."""
    if who:
        bench_peers.compile_only()
    run = bench_peers.load(who, case)[0] if who else bench_cases.caller(case)
    made = bench_cases.tensors(case, "cuda")
    if case.direction == "fwdbwd":
        made = {name: x.requires_grad_() for name, x in made.items()}
        gradients(run, made, torch.ones_like(run(made)))
    else:
        run(made)


class Table:
    """One row per case and peer, kept in a CSV file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.rows: dict[tuple[str, ...], Row] = {tuple(row[name] for name in KEY): row for row in csv.DictReader(lines)}

    @staticmethod
    def key(case: Case, peer: str) -> tuple[str, ...]:
        return tuple(str((asdict(case) | {"peer": peer})[name]) for name in KEY)

    def has(self, case: Case, peer: str) -> bool:
        """Whether the file has a case, of this very commit (never of files that changed since)."""
        row, now = self.rows.get(self.key(case, peer), {}), machine()
        return now["commit"][-1:] not in ("", "+") and row.items() >= now.items()

    def put(self, row: Row) -> Row:
        row = self.rows[tuple(row[name] for name in KEY)] = {name: row.get(name, "") for name in COLUMNS}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".partial")
        with unfinished.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
        unfinished.replace(self.file)
        return row


def default_file() -> Path:
    name = machine()["gpu"].lower().removeprefix("nvidia ").replace(" ", "-")
    return Path("benchmarks/results") / f"kernels-{name}.csv"


@cache
def machine() -> Row:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else ""
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton, "commit": _commit()}


def _commit() -> str:
    """ZOO_COMMIT where it is set (a copy without its history), else git's; "+" after it says that files changed."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    if (given := os.environ.get("ZOO_COMMIT")) or shutil.which("git") is None:
        return given or ""
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def cells(row: Row) -> tuple[str, ...]:
    """A row as it is printed, under `HEADER`."""
    ratio = f"{float(row['peer_ms']) / float(row['zoo_ms']):.2f}" if row["peer_ms"] and row["zoo_ms"] else ""
    shape = f"({row['B']},{row['T']},{row['H']},{row['D']})"
    what = " ".join(f"{row['op']} {row['variant']} {row['options']}".split())
    numbers = (row["zoo_ms"] or row["check"], row["peer"], row["peer_ms"], ratio, row["floor_ms"], row["zoo_gib"])
    return (what, shape, row["direction"], *numbers)


HEADER = ("op", "B,T,H,D", "direction", "zoo ms", "peer", "peer ms", "times faster", "floor ms", "zoo GiB")


def summary(rows: list[Row]) -> list[tuple[str, ...]]:
    """By op, variant, direction and peer: the geometric mean and the least of the speed-ups beside the bar, and the
    most memory by the peer's. A step is measured by its floor."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in (row for row in rows if row["zoo_ms"] and (row["peer_ms"] or row["direction"] == "decode")):
        groups.setdefault(tuple(row[name] for name in SUMMARY_HEADER[:4]), []).append(row)
    return [(*key, *_verdict(key[2], found)) for key, found in groups.items()]


def _verdict(direction: str, rows: list[Row]) -> tuple[str, ...]:
    if direction == "decode":
        slowest = max(float(row["zoo_ms"]) / float(row["floor_ms"]) for row in rows)
        return f"{slowest:.2f} x floor", "", "", f"<= {DECODE_BAR}", "yes" if slowest <= DECODE_BAR else "no"
    ratios = [float(row["peer_ms"]) / float(row["zoo_ms"]) for row in rows]
    mean, least = statistics.geometric_mean(ratios), min(ratios)
    memory = max(float(row["zoo_gib"] or 0) / max(float(row["peer_gib"] or 0), 1e-9) for row in rows)
    bar = BARS[direction] if rows[0]["peer"] == "fla" else 1.0
    passed = mean >= bar and least >= 1.0 and (direction == "fwd" or memory <= 1.0)
    return f"{mean:.2f}", f"{least:.2f}", f"{memory:.2f}", f">= {bar}", "yes" if passed else "no"


SUMMARY_HEADER = ("op", "variant", "direction", "peer", "geometric mean", "least", "memory", "bar", "met")


def plot(rows: list[Row], file: Path) -> None:
    """Times of every case that was timed, ours, the peer's and the floor, on a logarithmic axis."""
    from matplotlib.figure import Figure

    if not (shown := [row for row in rows if row["zoo_ms"]]):
        return
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for label, mark in (("floor", "|"), ("peer", "s"), ("zoo", "o")):
        times = [float(row[f"{label}_ms"] or "nan") for row in shown]
        axes.plot(times, range(len(shown)), mark, label=label)
    axes.set_yticks(range(len(shown)), [" ".join(cells(row)[:3]) for row in shown], fontsize=6)
    axes.set_xscale("log")
    axes.set_xlabel(f"ms on {shown[0]['gpu']}, {shown[0]['dtype']}")
    axes.invert_yaxis()
    axes.legend(loc="best")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    compile_one(Case(**json.loads(sys.argv[1])), sys.argv[2] if len(sys.argv) > 2 else "")
