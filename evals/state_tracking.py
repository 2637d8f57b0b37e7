"""State tracking: the running product of group elements, for models trained on it.

Example of parity (a label judges the prediction after its token):

    ids      1  0  1  1  0
    labels   1  1  0  1  1

and of S5, where a token names one of the 120 permutations of five things: the label is the permutation that all tokens
so far make, applied one after another. Parity separates models whose transition has negative eigenvalues from those
without (Grazzi et al. 2024, arXiv:2411.12537); S5 is out of reach for transformers and diagonal state spaces of fixed
depth as rows grow (Merrill et al. 2024, arXiv:2404.08819).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, permutations
from typing import Any

from torch import Tensor

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.labelled import Labelled, ask, stacked
from zoo.evals.core.records import Record, summarised
from zoo.evals.core.result import Result

VERSION = 1
NEEDS = ()
GROUPS = {"parity": 2, "s5": 5}  # permutations of how many things


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    groups: Sequence[str] | None = None,
    lengths: Sequence[int] = (16, 64, 256),
    samples: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy of `model` on rows of each group and length.

    Args:
        tokenizer: not used.
        groups: "parity", "s5" (default: those for which the model's vocabulary has room).
        lengths: tokens of a row.
        samples: rows per group and length; row i depends on (group, length, i, seed) alone.
        seed: seed of everything.
        batch_tokens: tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows at {"group": g, "length": L}: `accuracy`, the share of a row's states that are predicted, mean over rows;
        `final`, the last state is.

    Raises:
        ZooError: an unknown group, one that the vocabulary has no room for, or a length beyond the model's.
    """
    started = time.perf_counter()
    running.check_positive("state_tracking", samples=samples)
    chosen = _groups(running.vocab_size(model), groups)
    for length in lengths:
        running.check_length(model, length, "state_tracking")
    records = []
    for group in chosen:
        for length in lengths:
            made = [row(group, length, i, seed) for i in range(samples)]
            found = ask(model, "state_tracking", made, {"group": group, "length": length}, batch_tokens)
            records += [_with_final(record) for record in found]
    return running.build(
        "state_tracking", VERSION, model, summarised(records, by=["group", "length"]), started=started, seed=seed,
        options={"groups": chosen, "lengths": list(lengths), "samples": samples}, records=records,
    )  # fmt: skip


def _groups(held: int, groups: Sequence[str] | None) -> list[str]:
    if groups is None:
        return [group for group in GROUPS if order(group) <= held]
    for group in groups:
        if group not in GROUPS:
            raise ZooError(f"task 'state_tracking': group {group!r} is unknown; choose one of: {', '.join(GROUPS)}")
        if order(group) > held:
            raise ZooError(f"task 'state_tracking': group {group!r} needs {order(group)} tokens, the model has {held}")
    return list(groups)


def _with_final(record: Record) -> Record:
    return replace(record, scores={**record.scores, "final": record.output[-1] == record.answers[-1]})


def rows(group: str, length: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and labels `[N, L]` of `n` rows, for training."""
    return stacked(lambda sample: row(group, length, sample, seed), n)


def row(group: str, length: int, sample: int, seed: int) -> Labelled:
    """Ids and labels of one row."""
    rng = random.Random(f"state_tracking/{group}/{length}/{sample}/{seed}")
    ids = [rng.randrange(order(group)) for _ in range(length)]
    table = _products(GROUPS[group])
    return ids, list(accumulate(ids, lambda state, token: table[state][token]))


def order(group: str) -> int:
    """How many elements, and so tokens, the group has."""
    return len(_products(GROUPS[group]))


@cache
def _products(things: int) -> list[list[int]]:
    """`[state][token]` -> the state after the token's permutation; elements in lexical order, the identity first."""
    elements = list(permutations(range(things)))
    number = {element: i for i, element in enumerate(elements)}
    return [[number[tuple(token[place] for place in state)] for token in elements] for state in elements]
