"""The demo: convert the bundled teacher to a hybrid, heal it on this machine, and show what each step cost.

Nothing is downloaded: the text to heal and to evaluate on is sampled from the teacher.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from zoo import loading
from zoo.conversion.core.convert import convert
from zoo.conversion.core.heal import heal
from zoo.conversion.core.sampling import sample_rows
from zoo.conversion.core.texts import prefix
from zoo.errors import ZooError
from zoo.evals.core.report import table, write_html
from zoo.evals.core.runner import evaluate
from zoo.terminal import console

TEACHER = "books-llama-4m"
HYBRID = "gated_delta_net*3,attention"
WINDOW = "attention(window=64,sinks=1)*3,attention"
STATE_AT = 32768  # tokens


@dataclass(frozen=True)
class Budget:
    """How much the demo does; the defaults are for two CPU cores and ten minutes.

    Args:
        align_tokens, distill_tokens: of the two stages of healing; None is the default of `heal` for the device.
        data: what it heals on.
        text_rows, length: text for the evals, in rows of `length` tokens.
        samples: needles per length.
        lengths: of the evals, in tokens.
        tasks: the evals.
    """

    align_tokens: int | None = None
    distill_tokens: int | None = None
    data: str = "self"
    text_rows: int = 64
    length: int = 512
    samples: int = 20
    lengths: tuple[int, ...] = (256, 512)
    tasks: tuple[str, ...] = ("perplexity", "needle", "fidelity", "efficiency")


def run(out: Path, teacher: str = TEACHER, budget: Budget | None = None) -> dict[str, dict[str, Any]]:
    """Run the demo and write models, results and `index.html` to `out`.

    Returns:
        Results by model (teacher, window, swapped, healed) and task.

    Raises:
        ZooError: `out` exists, or the teacher cannot be loaded.
    """
    if out.exists():
        raise ZooError(f"{out} exists already; choose another directory with --out")
    budget, screen = budget or Budget(), console()
    source = loading.resolve(teacher)
    out.mkdir(parents=True)
    with step(screen, f"convert {teacher}: {HYBRID}, and {WINDOW} as the training-free comparison"):
        convert(str(source), out / "swapped", layout=HYBRID)
        convert(str(source), out / "window", layout=WINDOW)
    with step(screen, f"heal; data: {budget.data} (self is text sampled from the teacher)"):
        heal(
            str(source),
            str(out / "swapped"),
            out / "healed",
            data=budget.data,
            align_tokens=budget.align_tokens,
            distill_tokens=budget.distill_tokens,
        )
    models = {"teacher": source, **{name: out / name for name in ("window", "swapped", "healed")}}
    with step(screen, "evaluate on text that the teacher writes from another seed"):
        results = compare(models, out, budget)
    screen.print(table(list(results.items())))
    write_html(list(results.items()), out / "index.html")
    screen.print("\n".join(findings(results)))
    screen.print(f"wrote {out / 'index.html'}")
    return results


def compare(models: Mapping[str, Path], out: Path, budget: Budget) -> dict[str, dict[str, Any]]:
    """Results of each model, against the first."""
    tokenizer = loading.tokenizer(str(models["teacher"]))
    teacher = load(models["teacher"])
    text = out / "text.txt"
    rows = sample_rows(teacher, prefix(tokenizer), budget.text_rows, budget.length, seed=1_000_003)
    text.write_text("\n".join(tokenizer.batch_decode(rows, skip_special_tokens=True)), encoding="utf-8")
    return {
        name: evaluate(
            load(path),
            tokenizer,
            tasks=budget.tasks,
            teacher=teacher,
            data=str(text),
            lengths=budget.lengths,
            samples=budget.samples,
            out=out / "results" / name,
        )
        for name, path in models.items()
    }


def findings(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The two numbers that the demo is about, in words."""
    kl = {name: result["fidelity"].value("kl") for name, result in results.items()}
    state = {name: result["efficiency"].value("state_bytes", length=STATE_AT) for name, result in results.items()}
    return [
        f"KL to the teacher: swapped {kl['swapped']:.4g}, healed {kl['healed']:.4g} nats per token: "
        f"{kl['healed'] / kl['swapped']:.3f} of the swapped model's",
        f"state at {STATE_AT:,} tokens: teacher {state['teacher'] / 1e6:.2f} MB, healed {state['healed'] / 1e6:.2f} MB",
    ]


def load(path: Path) -> Any:
    """The model in fp32: on a CPU that is faster than bf16, and exact."""
    return loading.from_pretrained(str(path), dtype=torch.float32).eval()


@contextmanager
def step(screen: Console, title: str) -> Iterator[None]:
    screen.rule(title, align="left")
    start = time.monotonic()
    yield
    screen.print(f"{time.monotonic() - start:.0f} s", style="dim")
