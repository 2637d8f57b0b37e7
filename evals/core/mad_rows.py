"""Rows of the six tasks of MAD (Poli et al. 2024, arXiv:2403.17844), to train on and to test with.

Where this differs from the authors' generators (https://github.com/athms/mad-lab): all randomness is the row's own; a
token to copy may be followed by no blank; the pair that is asked for at the end of a fuzzy row is always in it; what
compression does not have to give back is not labelled.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from zoo.evals.core.labelled import IGNORE, Labelled, stacked
from zoo.evals.selective_copy import scattered

Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Setting:
    """What a MAD task varies around its baseline; tokens of noise are among `vocab_size`."""

    vocab_size: int
    length: int
    noise_tokens: int = 0
    noise: float = 0.0
    copies: int = 16
    motif: int = 3


BASELINES = {
    "in_context_recall": Setting(16, 128),
    "noisy_in_context_recall": Setting(32, 128, noise_tokens=16, noise=0.2),
    "fuzzy_in_context_recall": Setting(16, 128),
    "selective_copying": Setting(16, 256),
    "compression": Setting(16, 32),
    "memorization": Setting(256, 32),
}


def rows(task: str, n: int, seed: int, setting: Setting | None = None, train: bool = True) -> tuple[Tensor, Tensor]:
    """Ids and labels `[N, L]` of `n` rows of a task."""
    return stacked(lambda sample: row(task, sample, seed, setting, train), n)


def row(task: str, sample: int, seed: int, setting: Setting | None = None, train: bool = False) -> Labelled:
    """Ids and labels of one row; in training the recall tasks label every next token."""
    setting = setting or BASELINES[task]
    rng = random.Random(f"mad/{task}/{setting.length}/{sample}/{seed}")
    return MAKERS[task](rng, setting, train)


def least(task: str, setting: Setting) -> tuple[int, int]:
    """The smallest vocabulary and length that the task can be made of."""
    if task == "selective_copying":
        return 3, 2 * setting.copies + 2
    if task == "fuzzy_in_context_recall":
        return 2 * setting.motif + 2, 4 * setting.motif + 1
    return 4 + setting.noise_tokens, 4


def _recall(rng: random.Random, setting: Setting, train: bool) -> Labelled:
    tokens = setting.vocab_size - setting.noise_tokens
    count = setting.length // 2 - 1
    values: dict[int, int] = {}
    told = rng.randrange(count)  # this one is no noise, so that there is something to ask for
    ids, labels, seen = [], [], set()
    for i in range(count):
        if i != told and rng.random() < setting.noise:
            ids += [tokens + rng.randrange(setting.noise_tokens) for _ in range(2)]
            labels += [IGNORE, IGNORE]
            continue
        key = rng.randrange(tokens // 2)
        value = values.setdefault(key, rng.randrange(tokens // 2, tokens))
        ids += [key, value]
        labels += [value if key in seen else IGNORE, IGNORE]
        seen.add(key)
    asked = rng.choice(sorted(seen))
    ids, labels = [*ids, asked, values[asked]], [*labels, values[asked]]
    return ids[:-1], ids[1:] if train else labels


def _fuzzy(rng: random.Random, setting: Setting, train: bool) -> Labelled:
    """Keys and values of several tokens. Keys of a test all have the most; values, and keys in training, have any."""
    tokens, pad = setting.vocab_size - 1, setting.vocab_size - 1
    values: dict[tuple[int, ...], tuple[int, ...]] = {}

    def pair() -> Pair:
        size = rng.randint(1, setting.motif) if train else setting.motif
        key = tuple(rng.sample(range(tokens // 2), size))
        value = tuple(rng.sample(range(tokens // 2, tokens), rng.randint(1, setting.motif)))
        return key, values.setdefault(key, value)

    asked = pair()
    pairs: list[Pair] = []
    room = setting.length + 1 - 2 * _size(asked)
    while room >= 2 * setting.motif:
        pairs.append(pair())
        room -= _size(pairs[-1])
    pairs.insert(rng.randint(0, len(pairs)), asked)
    ids, labels, seen = [], [], set()
    for key, value in [*pairs, asked]:
        ids += [*key, *value]
        labels += [*([IGNORE] * (len(key))), *(value if key in seen else [IGNORE] * len(value))]
        seen.add(key)
    missing = setting.length + 1 - len(ids)
    ids, labels = [pad] * missing + ids, [IGNORE] * missing + labels
    return ids[:-1], ids[1:] if train else labels[1:]


def _size(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


def _copying(rng: random.Random, setting: Setting, train: bool) -> Labelled:
    blank, copy = setting.vocab_size - 2, setting.vocab_size - 1
    told = [rng.randrange(blank) for _ in range(setting.copies)]
    before = setting.length - setting.copies - 1
    ids = [*scattered(rng, told, before, blank), copy, *([blank] * setting.copies)]
    return ids, [IGNORE] * (before + 1) + told


def _compression(rng: random.Random, setting: Setting, train: bool) -> Labelled:
    """The label at a place is the token at that place, decoded from the last state alone."""
    ids = [rng.randrange(setting.vocab_size - 1) for _ in range(setting.length - 1)]
    return [*ids, setting.vocab_size - 1], [*ids, IGNORE]


def _memorization(rng: random.Random, setting: Setting, train: bool) -> Labelled:
    known = memory(setting.vocab_size)
    keys = [rng.randrange(len(known)) for _ in range(setting.length // 2)]
    ids = [token for key in keys for token in (key, setting.vocab_size - 1)]
    return ids, [label for key in keys for label in (IGNORE, known[key])]


@cache
def memory(vocab_size: int) -> tuple[int, ...]:
    """The value of each key, the same in every row: it has to be learned by heart."""
    keys, tokens = (vocab_size - 1) // 2, vocab_size - 1
    return tuple(random.Random(f"mad/memory/{vocab_size}").sample(range(keys, tokens), keys))


MAKERS: dict[str, Callable[[random.Random, Setting, bool], Labelled]] = {
    "in_context_recall": _recall,
    "noisy_in_context_recall": _recall,
    "fuzzy_in_context_recall": _fuzzy,
    "selective_copying": _copying,
    "compression": _compression,
    "memorization": _memorization,
}
