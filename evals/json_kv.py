"""Retrieval from a JSON object of random identifiers (Lost in the Middle, Liu et al. 2023, arXiv:2307.03172).

Example with `pairs=2` (identifiers shortened; the model is asked to continue it, and must produce ` "9a61e3c8-..."`):

    Extract the value corresponding to the specified key in the JSON object below.

    JSON data:
    {"1f0c2a77-...": "5d3be0a9-...",
     "c04e51d2-...": "9a61e3c8-..."}

    Key: "c04e51d2-..."
    Corresponding value:

The paper asks at sizes of 75, 140 and 300 pairs, HELMET's json_kv up to 1800 (with two examples before, which this does
not have). The depth of the pair is one of a few, so that every one has its share.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Sequence
from typing import Any

from zoo.evals.core import running
from zoo.evals.core.decoding import contains
from zoo.evals.core.questions import DEPTHS, Question, ask, check_depths, check_sizes
from zoo.evals.core.records import summarised
from zoo.evals.core.result import Result

VERSION = 1
NEEDS = ("tokenizer",)
SLACK = 4
TASK = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{records}\n\n"
    'Key: "{key}"\nCorresponding value:'
)


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    pairs: Sequence[int] = (4, 16),
    depths: Sequence[int] = DEPTHS,
    samples: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on `samples` objects of each size.

    Args:
        pairs: numbers of pairs in an object; the paper's are 75, 140 and 300.
        depths: percent of the pairs before the one that is asked for; sample i is at depth i modulo their number.
        samples: objects per size, over all depths; sample i depends on (size, i, seed) and its depth alone.
        seed: seed of the identifiers.
        batch_tokens: prompt tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `accuracy` at {"pairs": n} and at {"pairs": n, "depth": percent}: the value is a substring of the answer.
        Binomial standard errors, Wilson intervals.

    Raises:
        ZooError: no tokenizer, a depth that is no percent, no pairs, or an object beyond the model's length.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "json_kv")
    running.check_positive("json_kv", samples=samples)
    check_depths("json_kv", depths)
    check_sizes("json_kv", "pairs", pairs, 1, 1_000_000)
    records = []
    for size in pairs:
        asked = [question(size, depths[i % len(depths)], i, seed) for i in range(samples)]
        records += ask(model, tokenizer, "json_kv", asked, contains, slack=SLACK, batch_tokens=batch_tokens)
    return running.build(
        "json_kv", VERSION, model, summarised(records, by=["pairs"]) + summarised(records, by=["pairs", "depth"]),
        started=started, options={"pairs": list(pairs), "depths": list(depths), "samples": samples},
        seed=seed, records=records,
    )  # fmt: skip


def question(pairs: int, depth: int, sample: int, seed: int) -> Question:
    """One object and the key that is asked for."""
    rng = random.Random(f"json_kv/{pairs}/{sample}/{seed}")
    entries = [(_identifier(rng), _identifier(rng)) for _ in range(pairs)]
    key, value = entries[round((pairs - 1) * depth / 100)]
    listed = ",\n ".join(f'"{name}": "{held}"' for name, held in entries)
    text = TASK.replace("{records}", "{" + listed + "}").replace("{key}", key)
    return Question(text, value, {"pairs": pairs, "depth": depth})


def _identifier(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
