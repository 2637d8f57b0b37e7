"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): which mixers can look up what they were told.

    python benchmarks/mqar.py --out benchmarks/results/mqar-h200.csv --minutes 9 --jobs 12
    python benchmarks/mqar.py --table benchmarks/results/mqar-h200.csv

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
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

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
BATCH, STEPS, RATE, WARMUP, SOLVED = 64, 4000, 3e-3, 200, 0.995
FIELDS = (
    "mixer", "width", "seed", "accuracy", "steps", "loss", "state_bytes", "parameters", "tokens_per_s", "train_s",
    "gpu", "torch", "error",
)  # fmt: skip


# ---- the task -------------------------------------------------------------------------------------------------------
def examples(rows: int, generator: torch.Generator, device: str, mixed: bool = False) -> tuple[Tensor, Tensor]:
    """Ids `[rows, TOKENS]` and labels, -100 but where a value is asked for. Keys, values and noise do not overlap.

    Every row has 32 pairs, or if `mixed` any power of two up to that, and asks for 32 values.
    """
    third = VOCABULARY // 3
    ids = torch.randint(2 * third, VOCABULARY, (rows, TOKENS), generator=generator, device=device)
    labels = torch.full_like(ids, -100)
    keys = distinct(rows, third, generator, device)
    values = third + torch.randint(0, third, (rows, PAIRS), generator=generator, device=device)
    powers = int(math.log2(PAIRS))
    least = 0 if mixed else powers
    pairs = 2 ** torch.randint(least, powers + 1, (rows, 1), generator=generator, device=device)
    number = torch.arange(PAIRS, device=device)
    for first, tokens in ((0, keys), (1, values)):
        places = slice(first, 2 * PAIRS, 2)
        ids[:, places] = torch.where(number < pairs, tokens, ids[:, places])
    asked = number % pairs
    free = torch.rand(rows, TOKENS - 2 * PAIRS, generator=generator, device=device)
    places = 2 * PAIRS + free.argsort(1)[:, :PAIRS]
    ids.scatter_(1, places, keys.gather(1, asked))
    labels.scatter_(1, places, values.gather(1, asked))
    return ids, labels


def distinct(rows: int, count: int, generator: torch.Generator, device: str) -> Tensor:
    """`[rows, PAIRS]` different numbers below `count`."""
    return torch.rand(rows, count, generator=generator, device=device).topk(PAIRS, 1).indices


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


def run(mixer: str, width: int, seed: int, device: str, steps: int) -> dict[str, Any]:
    """Train one model and measure it; an error is a result too."""
    line: dict[str, Any] = dict(mixer=mixer, width=width, seed=seed, torch=torch.__version__, gpu=_gpu(device))
    try:
        line |= measured(mixer, width, seed, device, steps)
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return line


def measured(mixer: str, width: int, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = model_of(mixer, width).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.98))
    generator = torch.Generator(device).manual_seed(seed + 1000)
    start, used, loss = time.perf_counter(), 0, math.nan
    for used in range(1, steps + 1):
        rate = RATE * min(1.0, used / WARMUP) * 0.5 * (1 + math.cos(math.pi * used / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss_of(model, *examples(BATCH, generator, device, mixed=True), device)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if used % 200 == 0:
            loss = value.item()
            if not math.isfinite(loss) or loss < 0.005:
                break
    seconds = time.perf_counter() - start
    test = torch.Generator(device).manual_seed(7)
    return dict(
        accuracy=round(accuracy(model.eval(), test, device), 4),
        steps=used,
        loss=round(loss, 4),
        state_bytes=model.state_bytes(TOKENS, 2),
        parameters=sum(p.numel() for p in model.parameters()),
        tokens_per_s=round(used * BATCH * TOKENS / seconds),
        train_s=round(seconds, 1),
    )


def loss_of(model: ZooForCausalLM, ids: Tensor, labels: Tensor, device: str) -> Tensor:
    """Cross-entropy where a value is asked for; the label of a position is what should follow it."""
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        asked = labels >= 0
        logits = model.logits(hidden[asked])
    return torch.nn.functional.cross_entropy(logits.float(), labels[asked])


def accuracy(model: ZooForCausalLM, generator: torch.Generator, device: str, rows: int = 1000) -> float:
    """Share of values found, on rows that training did not see."""
    right = total = 0
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        for _ in range(max(1, rows // BATCH)):
            ids, labels = examples(BATCH, generator, device)
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            asked = labels >= 0
            right += int((model.logits(hidden[asked]).argmax(-1) == labels[asked]).sum())
            total += int(asked.sum())
    return right / total


def _gpu(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


# ---- all runs -------------------------------------------------------------------------------------------------------
def wanted(mixers: list[str], done: set[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    """What is missing; every mixer once before any a second time."""
    for seed in SEEDS:
        for width in WIDTHS:
            for mixer in mixers:
                if (mixer, width, seed) not in done:
                    yield mixer, width, seed


def causal_mixers() -> list[str]:
    """All but encoders, and those that only read what another mixer made of the tokens."""
    classes = {name: registry.get("mixers", name, "MODULE") for name in registry.names("mixers")}
    causal = {name: cls for name, cls in classes.items() if not cls.encoder_only}
    return [name for name, cls in causal.items() if not cls.reads_of(cls.parse(cls.default_args(WIDTHS[0], HEADS)))]


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def work(tasks: Any, results: Any, device: str, steps: int, stop: float) -> None:
    """Take tasks until there is none, or until the time is over."""
    torch.set_num_threads(1)
    while time.time() < stop:
        task = tasks.get()
        if task is None:
            break
        results.put(run(*task, device, steps))
    results.put(None)


def train(out: Path, mixers: list[str], jobs: int, minutes: float, device: str, steps: int) -> None:
    """Run what is missing in `jobs` processes and append each line to `out` as it comes."""
    lines = read(out)
    done = {(row["mixer"], int(row["width"]), int(row["seed"])) for row in lines if not row["error"]}
    if failed := [row for row in lines if row["error"]]:
        lines = [row for row in lines if row not in failed]
        write(out, lines, "w")
    todo = list(wanted(mixers, done))
    console = Console()
    console.print(f"{len(todo)} runs to do, {len(done)} done; {jobs} at a time on {_gpu(device)}")
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for task in [*todo, *[None] * jobs]:
        tasks.put(task)
    stop = time.time() + 60 * minutes
    arguments = (tasks, results, device, steps, stop)
    workers = [context.Process(target=work, args=arguments, daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    running, finished = jobs, 0
    tasks.cancel_join_thread()  # what no worker took must not hold up the end
    while running:
        line = results.get()
        if line is None:
            running -= 1
            continue
        write(out, [line], "a")
        finished += 1
        found = line.get("error") or f"accuracy {line['accuracy']:.3f} after {line['steps']} steps, {line['train_s']} s"
        console.print(f"{finished}/{len(todo)} {line['mixer']} {line['width']} seed {line['seed']}: {found}")


def write(out: Path, lines: list[dict[str, Any]], mode: str) -> None:
    fresh = mode == "w" or not out.exists()
    with out.open(mode, newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        if fresh:
            writer.writeheader()
        writer.writerows(lines)


def table(path: Path) -> str:
    """One row per mixer: accuracy (mean and worst seed) by width, state, speed."""
    groups: dict[str, dict[int, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in read(path):
        if not row["error"]:
            groups[row["mixer"]][int(row["width"])].append(row)
    rows = []
    for mixer, widths in sorted(groups.items()):
        cells = [mixer]
        for width in WIDTHS:
            found = [float(row["accuracy"]) for row in widths[width]]
            cells.append(f"{mean(found):.3f} ({min(found):.3f}, n={len(found)})" if found else "")
            cells.append(widths[width][0]["state_bytes"] if found else "")
        speeds = [float(row["tokens_per_s"]) for row in widths[WIDTHS[-1]]]
        rows.append((*cells, f"{mean(speeds) / 1e6:.2f}" if speeds else ""))
    header = ["mixer"]
    for width in WIDTHS:
        header += [f"accuracy at width {width}: mean (worst)", "state, bytes"]
    return markdown((*header, "training, million tokens/s"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mqar.csv"))
    parser.add_argument("--mixers", default="", help="comma-separated; all causal ones by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time on the one device")
    parser.add_argument("--minutes", type=float, default=1e6, help="no run starts later than this")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--table", type=Path, help="print the table of a CSV and stop")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixers = args.mixers.split(",") if args.mixers else causal_mixers()
    train(args.out, mixers, args.jobs, args.minutes, device, args.steps)


if __name__ == "__main__":
    main()
