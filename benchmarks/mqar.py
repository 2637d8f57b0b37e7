"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): which mixers can look up what they were told.

    python benchmarks/mqar.py --out benchmarks/results/mqar-h200.csv --minutes 9 --jobs 5 --each 8
    python benchmarks/mqar.py --table benchmarks/results/mqar-h200.csv

Run it until nothing is left to do: first one seed of each, where that fails at a lower learning rate too, then the
other seeds at the better one.

A row is 256 tokens: 32 pairs `key value`, then each key once more at a random later place, where its value is asked
for; the tokens between are noise. Example, with 2 pairs: `k1 v1 k2 v2 . k2 . . k1 .`, asked: v2 after the second k2, v1
after the second k1. A model has two layers of one mixer, nothing else but norms, and is trained from scratch, on rows
of 1, 2, 4, 8, 16 and 32 pairs (of few pairs each key is asked for several times), and tested on 32. One line
of the CSV is one mixer, width and seed; a run that finds lines there goes on with what is missing, and may be
interrupted.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Head, Layer, Rope
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.cards import markdown

TOKENS, PAIRS, VOCABULARY = 256, 32, 4096
WIDTHS, SEEDS, HEADS = (64, 128), (0, 1, 2), 2
BATCH, STEPS, RATES, WARMUP, SOLVED, TAUGHT = 128, 2000, (1e-2, 3e-3), 200, 0.003, 0.5
FIELDS = (
    "mixer", "width", "rate", "seed", "accuracy", "steps", "loss", "state_bytes", "parameters", "train_s",
    "gpu", "torch", "error",
)  # fmt: skip


class Task(NamedTuple):
    mixer: str
    width: int
    rate: float
    seed: int


# ---- the task -------------------------------------------------------------------------------------------------------
class Rows(NamedTuple):
    ids: Tensor  # [rows, TOKENS]
    places: Tensor  # [rows, PAIRS] where a value is asked for
    values: Tensor  # [rows, PAIRS] which

    @classmethod
    def draw(cls, rows: int, device: str, mixed: bool = False, generator: torch.Generator | None = None) -> Rows:
        """Rows of 32 pairs, or if `mixed` of any power of two up to that; keys, values and noise do not overlap."""
        third, made = VOCABULARY // 3, dict(generator=generator, device=device)
        ids = torch.randint(2 * third, VOCABULARY, (rows, TOKENS), **made)
        keys = torch.rand(rows, third, **made).topk(PAIRS, 1).indices
        values = third + torch.randint(0, third, (rows, PAIRS), **made)
        powers = int(math.log2(PAIRS))
        pairs = 2 ** torch.randint(0 if mixed else powers, powers + 1, (rows, 1), **made)
        number = torch.arange(PAIRS, device=device)
        for first, tokens in ((0, keys), (1, values)):
            told = slice(first, 2 * PAIRS, 2)
            ids[:, told] = torch.where(number < pairs, tokens, ids[:, told])
        places = 2 * PAIRS + torch.rand(rows, TOKENS - 2 * PAIRS, **made).argsort(1)[:, :PAIRS]
        asked = number % pairs
        return cls(ids.scatter(1, places, keys.gather(1, asked)), places, values.gather(1, asked))


# ---- one run --------------------------------------------------------------------------------------------------------
def model_of(mixer: str, width: int) -> ZooForCausalLM:
    """Two layers of `mixer` with the sizes that a layout string would give it."""
    layer = Layer(mixer=mixer, mixer_args=registry.get("mixers", mixer, "MODULE").default_args(width, HEADS))
    decoder = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        layers=(layer, layer),
        head=Head(tied=True),
        ropes={"default": Rope(dim=width // HEADS)},
        max_position_embeddings=TOKENS,
    )
    return ZooForCausalLM(ZooConfig.from_decoder(decoder, "mqar"))


class Run:
    """One model in training, on a stream of its own: small models leave a GPU idle, so that many train at a time."""

    def __init__(self, task: Task, device: str) -> None:
        self.task, self.device, self.used, self.loss = task, device, 0, math.nan
        torch.manual_seed(task.seed)
        self.model = model_of(task.mixer, task.width).to(device).train()
        self.rate = torch.zeros((), device=device)
        graph = device == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.rate, weight_decay=0.1, betas=(0.9, 0.98), fused=graph, capturable=graph
        )
        self.stream = torch.cuda.Stream() if graph else None
        self.go = self.recorded() if graph else self.step
        self.seconds = 0.0

    def step(self) -> Tensor:
        value = loss_of(self.model, Rows.draw(BATCH, self.device, mixed=True), self.device)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return value.detach()

    def recorded(self) -> Callable[[], Tensor]:
        """`step` as one CUDA graph, where it can be one. Its first runs have a rate of zero."""
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                value = self.step()
        except RuntimeError:
            torch.cuda.synchronize()
            return self.step

        def replay() -> Tensor:
            graph.replay()
            return value

        return replay

    def advance(self, steps: int) -> bool:
        """One step of `steps`; whether there are more."""
        self.used += 1
        rate = self.task.rate * min(1.0, self.used / WARMUP) * 0.5 * (1 + math.cos(math.pi * self.used / steps))
        with torch.cuda.stream(self.stream):
            self.rate.fill_(rate)
            value = self.go()
            if self.used % 250 == 0 or self.used == steps:
                self.loss = value.item()
        return self.used < steps and (self.used % 250 != 0 or self.loss >= SOLVED)

    def result(self) -> dict[str, Any]:
        return dict(
            accuracy=round(accuracy(self.model.eval(), self.device), 4),
            steps=self.used,
            loss=round(self.loss, 4),
            state_bytes=self.model.state_bytes(TOKENS, 2),
            parameters=sum(p.numel() for p in self.model.parameters()),
            train_s=round(self.seconds, 1),
        )


def run(tasks: Sequence[Task], device: str, steps: int) -> Iterator[dict[str, Any]]:
    """Train models side by side and measure them; an error is a result too."""
    lines: dict[Task, dict[str, Any]] = {}
    runs = []
    for task in tasks:
        lines[task] = dict(**task._asdict(), torch=torch.__version__, gpu=_gpu(device))
        try:
            runs.append(Run(task, device))
        except Exception as error:
            yield lines[task] | dict(error=worded(error))
    start, going = time.perf_counter(), list(runs)
    while going:
        going = [each for each in going if each.advance(steps)]
        for each in runs:
            if each not in going and not each.seconds:
                each.seconds = time.perf_counter() - start
    for each in runs:
        yield lines[each.task] | each.result()


def worded(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def loss_of(model: ZooForCausalLM, rows: Rows, device: str) -> Tensor:
    """Cross-entropy where a value is asked for."""
    logits = asked_logits(model, rows, device)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows.values.flatten())


def asked_logits(model: ZooForCausalLM, rows: Rows, device: str) -> Tensor:
    """`[rows, PAIRS, VOCABULARY]`"""
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
        hidden = model.model(input_ids=rows.ids, use_cache=False).last_hidden_state
        index = rows.places[..., None].expand(-1, -1, hidden.shape[-1])
        logits: Tensor = model.logits(hidden.gather(1, index))
        return logits


@torch.no_grad()
def accuracy(model: ZooForCausalLM, device: str, batches: int = 4) -> float:
    """Share of values found, on rows that training did not see."""
    generator = torch.Generator(device).manual_seed(7)
    draws = (Rows.draw(BATCH, device, generator=generator) for _ in range(batches))
    return mean(float((asked_logits(model, rows, device).argmax(-1) == rows.values).float().mean()) for rows in draws)


def _gpu(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


# ---- all runs -------------------------------------------------------------------------------------------------------
def wanted(mixers: list[str], accuracies: dict[Task, float]) -> list[Task]:
    """What is missing: the first seed, at the lower rate too where the higher one taught little; once these are there,
    the other seeds at the better rate."""
    cells = [(mixer, width) for mixer in mixers for width in WIDTHS]
    missing: list[list[Task]] = [[] for _ in SEEDS]
    for mixer, width in cells:
        first, second = (Task(mixer, width, rate, SEEDS[0]) for rate in RATES)
        tried = [first] if accuracies.get(first, 1.0) >= TAUGHT else [first, second]
        missing[0] += [task for task in tried if task not in accuracies]
        if all(task in accuracies for task in tried):
            better = max(tried, key=lambda task: accuracies[task])
            for place, seed in enumerate(SEEDS[1:], 1):
                missing[place] += [task for task in [better._replace(seed=seed)] if task not in accuracies]
    return [task for part in missing for task in part]


def causal_mixers() -> list[str]:
    """All but encoders, those that only read what another mixer made of the tokens, and attention whose keys are chosen
    without training."""
    classes = {name: registry.get("mixers", name, "MODULE") for name in registry.names("mixers")}
    causal = {name: cls for name, cls in classes.items() if not (cls.encoder_only or hasattr(cls, "method"))}
    return [name for name, cls in causal.items() if not cls.reads_of(cls.parse(cls.default_args(WIDTHS[0], HEADS)))]


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def work(groups: Any, results: Any, device: str, steps: int, stop: float) -> None:
    """Take groups of tasks until there is none, or until the time is over."""
    torch.set_num_threads(1)
    while time.time() < stop and (tasks := groups.get()):
        for line in run(tasks, device, steps):
            results.put(line)
    results.put(None)


def train(out: Path, mixers: list[str], jobs: int, each: int, minutes: float, device: str, steps: int) -> None:
    """Run what is missing in `jobs` processes of `each` models and append each line to `out` as it comes."""
    lines = read(out)
    done = {task_of(row): float(row["accuracy"]) for row in lines if not row["error"]}
    if failed := [row for row in lines if row["error"]]:
        lines = [row for row in lines if row not in failed]
        write(out, lines, "w")
    todo = wanted(mixers, done)
    console = Console()
    console.print(f"{len(todo)} runs to do, {len(done)} done; {jobs} x {each} at a time on {_gpu(device)}")
    context = multiprocessing.get_context("spawn")
    groups, results = context.Queue(), context.Queue()
    for first in range(0, len(todo), each):
        groups.put(todo[first : first + each])
    for _ in range(jobs):
        groups.put(())
    stop = time.time() + 60 * minutes
    arguments = (groups, results, device, steps, stop)
    workers = [context.Process(target=work, args=arguments, daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    running, finished = jobs, 0
    groups.cancel_join_thread()  # what no worker took must not hold up the end
    while running:
        line = results.get()
        if line is None:
            running -= 1
            continue
        write(out, [line])
        finished += 1
        found = line.get("error") or f"accuracy {line['accuracy']:.3f} after {line['steps']} steps, {line['train_s']} s"
        console.print(f"{finished}/{len(todo)} {line['mixer']} {line['width']} {line['rate']} {line['seed']}: {found}")


def time_steps(out: Path, mixers: list[str], device: str, steps: int = 20) -> None:
    """Tokens per second of a training step at the larger width, each mixer alone on the device."""
    done = {row["mixer"] for row in read(out)}
    for mixer in mixers:
        if mixer in done:
            continue
        run = Run(Task(mixer, WIDTHS[-1], 0.0, 0), device)
        for count in (3, steps):
            start = time.perf_counter()
            for _ in range(count):
                run.advance(1000)
            run.rate.item()  # waits for the device
            if run.stream is not None:
                run.stream.synchronize()
            seconds = (time.perf_counter() - start) / count
        line = dict(mixer=mixer, step_ms=round(seconds * 1e3, 3), tokens_per_s=round(BATCH * TOKENS / seconds))
        write(out, [line], fields=tuple(line))


def task_of(row: dict[str, str]) -> Task:
    return Task(row["mixer"], int(row["width"]), float(row["rate"]), int(row["seed"]))


def write(out: Path, lines: list[dict[str, Any]], mode: str = "a", fields: Sequence[str] = FIELDS) -> None:
    fresh = mode == "w" or not out.exists()
    with out.open(mode, newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        if fresh:
            writer.writeheader()
        writer.writerows(lines)


def table(path: Path) -> str:
    """One row per mixer: accuracy (mean and worst seed) by width, at the better rate; state, speed, literature."""
    said = json.loads(Path(__file__).with_name("mqar_literature.json").read_text())
    speeds = {row["mixer"]: float(row["tokens_per_s"]) for row in read(speed_path(path))}
    groups: dict[str, dict[int, dict[float, list[dict[str, str]]]]] = defaultdict(lambda: defaultdict(dict))
    for row in read(path):
        if not row["error"]:
            groups[row["mixer"]][int(row["width"])].setdefault(float(row["rate"]), []).append(row)
    rows = []
    for mixer, widths in sorted(groups.items()):
        cells = [mixer]
        for width in WIDTHS:
            best = max(widths[width].values(), key=found_mean, default=[])
            found = [float(row["accuracy"]) for row in best]
            cells.append(f"{mean(found):.3f} ({min(found):.3f})" if found else "")
            cells.append(best[0]["state_bytes"] if found else "")
        rows.append((*cells, f"{speeds[mixer] / 1e6:.2f}" if mixer in speeds else "", said.get(mixer, "")))
    header = ["mixer"]
    for width in WIDTHS:
        header += [f"accuracy at width {width}: mean (worst)", "state, bytes"]
    return markdown((*header, "training, million tokens/s", "what is said of it"), rows)


def speed_path(path: Path) -> Path:
    return path.with_stem(f"{path.stem}-speed")


def found_mean(rows: list[dict[str, str]]) -> float:
    return mean(float(row["accuracy"]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mqar.csv"))
    parser.add_argument("--mixers", default="", help="comma-separated; all causal ones by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time on the one device")
    parser.add_argument("--each", type=int, default=1, help="models that a process trains side by side")
    parser.add_argument("--minutes", type=float, default=1e6, help="no run starts later than this")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--speed", action="store_true", help="time the training step of each mixer, and train nothing")
    parser.add_argument("--table", type=Path, help="print the table of a CSV and stop")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixers = args.mixers.split(",") if args.mixers else causal_mixers()
    if args.speed:
        time_steps(speed_path(args.out), mixers, device)
        return
    train(args.out, mixers, args.jobs, args.each, args.minutes, device, args.steps)


if __name__ == "__main__":
    main()
