"""COPA: the likelier cause or effect.

Example: after "The woman retired therefore" the model rates " she received her pension." against " she paid off her
mortgage.".

Source of the prompts: lm-evaluation-harness (MIT), `copa`, but for the one space before a choice where it has two; the
comma that the examples have before "because" or "therefore" goes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from zoo.evals.core.choices import Item, evaluate_choices
from zoo.evals.core.jsonl import read_examples
from zoo.evals.core.result import Result

VERSION = 1
NEEDS = ("tokenizer", "examples")
FILE = "copa.jsonl"
METRICS = ("acc",)


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    examples: str | Path | None = None,
    samples: int | None = 200,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on COPA (Roemmele et al. 2011).

    Args:
        examples: a .jsonl file of objects with `query`, `choices` and `gold`,
            or a directory that holds `copa.jsonl`.
        samples: at most this many, from the start of the file (None: all).
        batch_tokens: tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `acc`.
        Binomial standard errors, Wilson intervals. Examples longer than the model allows are left out and counted in
        `skipped`.

    Raises:
        ZooError: no tokenizer, no usable examples, or none that fits the model.
    """
    return evaluate_choices(
        "copa",
        VERSION,
        model,
        tokenizer,
        [item(row) for row in read(examples)],
        metrics=METRICS,
        samples=samples,
        options={"examples": str(examples)},
        batch_tokens=batch_tokens,
        comparable_to="lm_eval:copa but for one space, not two, before a choice",
    )


def read(examples: str | Path | None) -> list[dict[str, Any]]:
    """The examples of a file or directory; an unusable one raises `ZooError`."""
    return read_examples(examples, "copa", FILE, ("query", "choices", "gold"))


def item(row: dict[str, Any]) -> Item:
    """One example as the texts that the model rates."""
    context = re.sub(r",(?= (?:because|therefore)$)", "", row["query"])
    return Item([(context, f" {choice}") for choice in row["choices"]], row["choices"], row["gold"])
