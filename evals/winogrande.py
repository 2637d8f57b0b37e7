"""WinoGrande by partial evaluation: which of two names makes the rest of a sentence likelier.

Example: " always got the easier cases." is rated after "Sarah was a much better surgeon than Maria so Sarah" and after
"Sarah was a much better surgeon than Maria so Maria".

Source of the prompts: lm-evaluation-harness (MIT), `winogrande` (Trinh and Le 2018, arXiv:1806.02847).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.evals.core.choices import Item, evaluate_choices
from zoo.evals.core.jsonl import read_examples
from zoo.evals.core.result import Result

VERSION = 1
NEEDS = ("tokenizer", "examples")
FILE = "winogrande.jsonl"
METRICS = ("acc",)


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    examples: str | Path | None = None,
    samples: int | None = 200,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on WinoGrande (Sakaguchi et al. 2019, arXiv:1907.10641).

    Args:
        examples: a .jsonl file of objects with `context_options`, `continuation` and `gold`,
            or a directory that holds `winogrande.jsonl`.
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
        "winogrande",
        VERSION,
        model,
        tokenizer,
        [item(row) for row in read(examples)],
        metrics=METRICS,
        samples=samples,
        options={"examples": str(examples)},
        batch_tokens=batch_tokens,
        comparable_to="lm_eval:winogrande",
    )


def read(examples: str | Path | None) -> list[dict[str, Any]]:
    """The examples of a file or directory; an unusable one raises `ZooError`."""
    return read_examples(examples, "winogrande", FILE, ("context_options", "continuation", "gold"))


def item(row: dict[str, Any]) -> Item:
    """One example as the texts that the model rates."""
    contexts = row["context_options"]
    return Item([(context, f" {row['continuation']}") for context in contexts], contexts, row["gold"])
