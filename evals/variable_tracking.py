"""Variable tracking in short programs: a number passed on from variable to variable.

Example with `hops=2`, `chains=2` (the model is asked to continue it, and must produce ` 31415`):

    VAR QKZ = 31415
    VAR PLM = 62718
    VAR ABX = VAR QKZ
    VAR WOT = VAR PLM
    VAR JNE = VAR ABX
    VAR HUV = VAR WOT
    Question: What is the value of VAR JNE?
    Answer: The value of VAR JNE is

Lines of all chains are mixed in a random order that keeps each chain's own. The last variable of one chain is asked
for, so that the number is found through all `hops` lines. It is the core of RULER's vt (Hsieh et al. 2024,
arXiv:2404.06654) without its filler, and with one number to find instead of a list of variables.
"""

from __future__ import annotations

import random
import string
import time
from collections.abc import Sequence
from typing import Any

from zoo.evals.core import running
from zoo.evals.core.decoding import first_number
from zoo.evals.core.questions import Question, ask, check_sizes
from zoo.evals.core.records import summarised
from zoo.evals.core.result import Result

VERSION = 1
NEEDS = ("tokenizer",)
MOST = 1000  # variables


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    hops: Sequence[int] = (1, 2, 4),
    chains: int = 4,
    samples: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on `samples` programs of each number of hops.

    Args:
        hops: lines between a number and the variable that is asked for; 0 asks for the number itself.
        chains: numbers that are passed on.
        samples: programs per number of hops; program i depends on (hops, chains, i, seed) alone.
        seed: seed of everything.
        batch_tokens: prompt tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `accuracy` at {"hops": n}: the first number of the answer is the variable's. Binomial standard errors,
        Wilson intervals.

    Raises:
        ZooError: no tokenizer, more than 1000 variables, or a program beyond the model's length.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "variable_tracking")
    running.check_positive("variable_tracking", samples=samples, chains=chains)
    check_sizes("variable_tracking", "hops", hops, 0, MOST // chains - 1)
    records = []
    for count in hops:
        asked = [question(count, chains, i, seed) for i in range(samples)]
        records += ask(model, tokenizer, "variable_tracking", asked, is_value, batch_tokens=batch_tokens)
    return running.build(
        "variable_tracking", VERSION, model, summarised(records, by=["hops"]), started=started, seed=seed,
        options={"hops": list(hops), "chains": chains, "samples": samples}, records=records,
    )  # fmt: skip


def is_value(output: str, value: str) -> bool:
    """The first number is the value."""
    return first_number(output) == value


def question(hops: int, chains: int, sample: int, seed: int) -> Question:
    """One program and the variable that is asked for."""
    rng = random.Random(f"variable_tracking/{hops}/{chains}/{sample}/{seed}")
    values = [str(value) for value in rng.sample(range(10_000, 100_000), chains)]
    variables = _names(rng, chains * (hops + 1))
    own = [variables[i::chains] for i in range(chains)]
    order = [i for i in range(chains) for _ in range(hops + 1)]
    rng.shuffle(order)
    seen = [0] * chains
    lines = []
    for i in order:
        source = f"VAR {own[i][seen[i] - 1]}" if seen[i] else values[i]
        lines.append(f"VAR {own[i][seen[i]]} = {source}")
        seen[i] += 1
    asked = rng.randrange(chains)
    last = own[asked][-1]
    closing = [f"Question: What is the value of VAR {last}?", f"Answer: The value of VAR {last} is"]
    return Question("\n".join([*lines, *closing]), values[asked], {"hops": hops})


def _names(rng: random.Random, count: int) -> list[str]:
    """Distinct names of three capitals."""
    return ["".join(string.ascii_uppercase[n // 26**p % 26] for p in range(3)) for n in rng.sample(range(26**3), count)]
