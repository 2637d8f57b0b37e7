"""What training-free sparse attention costs a model: needle and perplexity of every method at every budget.

    python benchmarks/sparse_quality.py books-llama-22m --data heldout.txt --samples 20
    python benchmarks/sparse_quality_report.py docs/sparse.md

A method is measured where it acts. The needle: the prompt but its last token is prefill, that token and the answer are
decoded one by one. Perplexity is of the last `SCORED` tokens of each window: in one forward by a method of prefill; one
by one, after a prefill, by a method of decode. What a method does not choose is dense. A budget is a share of `LENGTH`
tokens. Options are those of each file's EXAMPLE, and what it calibrates is calibrated first, on other text.

Rows go to a CSV as they are ready; what is in it already is not measured again.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sparse_quality_report import FILE, read
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import zoo
from zoo import registry
from zoo.architectures.core import calibration, foreign, methods
from zoo.architectures.core.methods import Choice, Part
from zoo.evals.core.decoding import answer_tokens, contains
from zoo.evals.core.haystack import Haystack
from zoo.evals.core.text import read_text, windows
from zoo.evals.core.words import keys

LENGTH, SCORED, SLACK = 1900, 128, 8
BUDGETS = (0.06, 0.12, 0.25, 0.5)
ROWS = 5  # prompts that run together
CALIBRATION = (2, 1024)  # rows and tokens
COLUMNS = (
    *("model", "method", "phases", "budget", "length", "samples", "windows", "needle", "needle_se", "perplexity"),
    *("ratio", "calibrated", "seconds", "device", "dtype", "torch", "error"),
)
KEY = ("model", "method", "budget", "length", "samples", "windows")


class Bench:
    """A model with the prompts and windows that every method is measured on."""

    def __init__(self, name: str, data: Path, other: Path, samples: int, count: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = zoo.from_pretrained(name, attention="quest", dtype=self.dtype).to(self.device).eval()
        self.tokenizer = zoo.tokenizer(name)
        text = read_text(data, "needle")
        haystack = Haystack(text, self.tokenizer)
        questions = haystack.questions(keys(), LENGTH, samples, 0)
        self.values = [question.value for question in questions]
        self.max_new = answer_tokens(self.tokenizer, self.values, SLACK)
        prompts = haystack.prompts(questions, LENGTH - self.max_new)
        self.prompts = [padded(prompts[i : i + ROWS], self.device) for i in range(0, samples, ROWS)]
        self.windows = windows(text, self.tokenizer, LENGTH, count).rows.to(self.device).split(ROWS)
        rows, tokens = CALIBRATION
        self.other = windows(read_text(other, "calibrate"), self.tokenizer, tokens, rows).rows[:, :-1].to(self.device)
        self.dense: dict[tuple[str, int], DynamicCache] = {}
        self.depth = self.model.config.get_text_config(decoder=True).num_hidden_layers

    def attend(self, choice: Choice | None) -> None:
        if choice is None:
            foreign.detach(self.model)
        else:
            foreign.attach(self.model, choice)

    def measure(self, choice: Choice | None) -> dict[str, float]:
        """Needle and perplexity by a choice of methods; None is dense."""
        found = list(self.answers(choice))
        hits = [contains(answer, value) for answer, value in zip(found, self.values, strict=True)]
        share = sum(hits) / len(hits)
        nll = torch.cat(list(self.losses(choice)))
        return dict(
            needle=share, needle_se=math.sqrt(share * (1 - share) / len(hits)), perplexity=math.exp(nll.mean().item())
        )

    def answers(self, choice: Choice | None) -> Iterator[str]:
        for index, (ids, mask) in enumerate(self.prompts):
            cache = self.filled("needle", index, ids[:, :-1], mask[:, :-1], choice)
            before = cache.get_seq_length()
            self.attend(choice)
            new, last = [], ids[:, -1:]
            values = self.values[index * ROWS : index * ROWS + len(ids)]
            for _ in range(self.max_new):
                mask = mask if not new else torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
                last = self.logits(last, mask, cache)[:, -1].argmax(-1, keepdim=True)
                new.append(last)
                texts = self.tokenizer.batch_decode(torch.cat(new, 1).tolist())
                if all(value in text for value, text in zip(values, texts, strict=True)):
                    break
            cache.crop(before - cache.get_seq_length())
            yield from texts

    def losses(self, choice: Choice | None) -> Iterator[Tensor]:
        """Negative log-likelihoods of the last tokens of each window."""
        one_by_one = choice is not None and "decode" in phases_of(choice)
        for index, rows in enumerate(self.windows):
            ids, targets = rows[:, :-1], rows[:, -SCORED:]
            if one_by_one:
                cache = self.filled("windows", index, ids[:, :-SCORED], None, choice)
                before = cache.get_seq_length()
                self.attend(choice)
                steps = [self.logits(ids[:, t : t + 1], None, cache) for t in range(LENGTH - SCORED, LENGTH)]
                cache.crop(before - cache.get_seq_length())
                logits = torch.cat(steps, 1)
            else:
                self.attend(choice)
                logits = self.logits(ids, None, None, keep=SCORED)
            yield F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")

    def filled(self, name: str, index: int, ids: Tensor, mask: Tensor | None, choice: Choice | None) -> DynamicCache:
        """A cache that has read `ids`: of a method that leaves prefill dense, the same for all such."""
        if choice is not None and "prefill" in phases_of(choice):
            return self.fill(ids, mask, choice)
        if (name, index) not in self.dense:
            self.dense[name, index] = self.fill(ids, mask, None)
        return self.dense[name, index]

    def fill(self, ids: Tensor, mask: Tensor | None, choice: Choice | None) -> DynamicCache:
        self.attend(choice)
        cache = DynamicCache(config=self.model.config)
        self.logits(ids, mask, cache)
        return cache

    @torch.inference_mode()
    def logits(self, ids: Tensor, mask: Tensor | None, cache: DynamicCache | None, keep: int = 1) -> Tensor:
        places = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out: Tensor = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        ).logits
        return out

    def choice(self, method: str, budget: float) -> tuple[Choice, bool]:
        """The choice of a method at a share of the tokens, and whether it was calibrated."""
        module = registry.load("mixers", method)
        known = methods.options_of(method)
        sizes = {name: value for name, value in module.EXAMPLE.items() if isinstance(value, (int, float, str))}
        args = {name: value for name, value in sizes.items() if name in known}
        choice = Choice.parse(method, args | {"budget": round(budget * LENGTH)})
        choice.check(self.depth)
        if not hasattr(module, "calibrate"):
            return choice, False
        self.attend(choice)
        layers = calibration.calibrate(self.model, choice, self.other)
        return Choice((Part(method, choice.parts[0].own, layers),)), True


def phases_of(choice: Choice) -> tuple[str, ...]:
    phases: tuple[str, ...] = methods.mixer_of(choice.parts[0].name).method.phases
    return phases


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts that differ by a few tokens as one `[B, T]` with padding on the left, and its mask."""
    total = max(map(len, prompts))
    ids = [[0] * (total - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (total - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def append(file: Path, row: dict[str, Any]) -> None:
    new = not file.is_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def run(args: argparse.Namespace) -> None:
    done = {tuple(row[name] for name in KEY): row for row in read(args.out) if not row["error"]}
    wanted = args.methods.split(",") if args.methods else list(methods.names())
    budgets = [float(budget) for budget in args.budgets.split(",")] if args.budgets else BUDGETS
    cases = [("dense", 1.0), *((method, budget) for method in wanted for budget in budgets)]
    common = dict(model=Path(args.model).name, length=LENGTH, samples=args.samples, windows=args.windows)
    left = [case for case in cases if key_of(common, *case) not in done]
    if not left:
        return
    bench = Bench(args.model, args.data, args.other, args.samples, args.windows)
    for method, budget in left:
        row: dict[str, Any] = dict(common, method=method, budget=budget, device=bench.device.type)
        row |= dict(dtype=str(bench.dtype).removeprefix("torch."), torch=torch.__version__, calibrated="no")
        start = time.perf_counter()
        try:
            choice = None
            if method != "dense":
                choice, calibrated = bench.choice(method, budget)
                row |= dict(calibrated="yes" if calibrated else "no", phases="+".join(phases_of(choice)))
            row |= bench.measure(choice)
        except (ValueError, RuntimeError) as error:
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        row["seconds"] = round(time.perf_counter() - start, 1)
        if method == "dense":
            done[key_of(common, method, budget)] = row
        if "perplexity" in row:
            row["ratio"] = row["perplexity"] / float(done[key_of(common, "dense", 1.0)]["perplexity"])
        append(args.out, rounded(row))
        print(*(f"{name} {value}" for name, value in rounded(row).items() if name in COLUMNS[1:]), flush=True)


def key_of(common: dict[str, Any], method: str, budget: float) -> tuple[str, ...]:
    values = {**common, "method": method, "budget": float(budget)}
    return tuple(str(values[name]) for name in KEY)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="books-llama-4m", help="name, directory or hub id")
    parser.add_argument("--data", type=Path, required=True, help="held-out text")
    parser.add_argument("--other", type=Path, help="text to calibrate on (default: --data)")
    parser.add_argument("--methods", help="with commas between them; all by default")
    parser.add_argument("--budgets", help="shares with commas between them")
    parser.add_argument("--samples", type=int, default=20, help="needles")
    parser.add_argument("--windows", type=int, default=10, help="windows of held-out text")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    args.other = args.other or args.data
    run(args)


if __name__ == "__main__":
    main()
