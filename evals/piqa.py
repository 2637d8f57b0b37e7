r"""PIQA: which of two ways reaches a goal.

Example: after "Question: How do I cool soup?\nAnswer:" the model rates " Stir it." against " Boil it.".

Source of the prompts: lm-evaluation-harness (MIT), `piqa`; the examples hold "Question: GOAL".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.evals.core.choices import Item, evaluate_choices
from zoo.evals.core.jsonl import read_examples
from zoo.evals.core.result import Result

VERSION = 1
NEEDS = ("tokenizer", "examples")
FILE = "piqa.jsonl"
METRICS = ("acc", "acc_norm", "acc_bytes")


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    examples: str | Path | None = None,
    samples: int | None = 200,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on PIQA (Bisk et al. 2020, arXiv:1911.11641).

    Args:
        examples: a .jsonl file of objects with `query`, `choices` and `gold`,
            or a directory that holds `piqa.jsonl`.
        samples: at most this many, from the start of the file (None: all).
        batch_tokens: tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `acc`, `acc_norm` (per character) and `acc_bytes` (per byte of the choice).
        Binomial standard errors, Wilson intervals. Examples longer than the model allows are left out and counted in
        `skipped`.

    Raises:
        ZooError: no tokenizer, no usable examples, or none that fits the model.
    """
    return evaluate_choices(
        "piqa",
        VERSION,
        model,
        tokenizer,
        [item(row) for row in read(examples)],
        metrics=METRICS,
        samples=samples,
        options={"examples": str(examples)},
        batch_tokens=batch_tokens,
        comparable_to="lm_eval:piqa",
    )


def read(examples: str | Path | None) -> list[dict[str, Any]]:
    """The examples of a file or directory; an unusable one raises `ZooError`."""
    return read_examples(examples, "piqa", FILE, ("query", "choices", "gold"))


def item(row: dict[str, Any]) -> Item:
    """One example as the texts that the model rates."""
    context = row["query"].removesuffix("\n") + "\nAnswer:"
    return Item([(context, f" {choice}") for choice in row["choices"]], row["choices"], row["gold"])
