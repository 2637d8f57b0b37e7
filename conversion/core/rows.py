"""Training rows from named sources: which row of which source stands at which place, as a function of the place alone.

A resumed run therefore reads what an uninterrupted one would, on any number of processes.
R rows of a run, B rows of a batch, L tokens per row. A row holds token ids; a negative one, `~id`, is a token whose
successor is not to be learned (see `hide` and `shown`): a prompt in a conversation, padding, the end of a document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError

Array = NDArray[Any]
GOLDEN = (5**0.5 - 1) / 2


def hide(ids: Array, learned: Array) -> Array:
    """Ids `[..., L]` marked where `learned [..., L]` is False."""
    return np.where(learned, ids, ~ids.astype(np.int64))


def shown(rows: Array) -> tuple[Array, Array | None]:
    """Ids, and where their successors are learned; None stands for everywhere."""
    learned = rows >= 0
    return (rows, None) if learned.all() else (np.where(learned, rows, ~rows), learned)


class Rows(Protocol):
    """An endless sequence of rows."""

    def take(self, indices: Array) -> Array:
        """Rows [n, L] at the given places [n], which never decrease from call to call."""


@dataclass(frozen=True)
class Part:
    """A source of a mixture and the share of rows that it gives."""

    name: str
    fraction: float


def parse(data: str) -> list[Part]:
    """The parts of `"train.txt.xz,recall=0.4"`: shares that are not given are what is left, in equal parts.

    Raises:
        ZooError: no source, a share that is no number in (0, 1], or shares that do not add up to 1.
    """
    entries = [entry.strip().rpartition("=") for entry in data.split(",") if entry.strip()]
    given = {name: _share(name, text) for name, mark, text in entries if mark and _is_number(text)}
    names = [name if mark and _is_number(text) else f"{name}{mark}{text}" for name, mark, text in entries]
    if not names or len(set(names)) < len(names):
        raise ZooError(f"data was {data!r}; it must name each source once, like books.txt,recall=0.4")
    open_names = [name for name in names if name not in given]
    left = 1.0 - sum(given.values())
    if left < -1e-6 or (open_names and left <= 1e-6) or (not open_names and left > 1e-6):
        raise ZooError(f"data was {data!r}; its shares must add up to 1, with one source's left out for the rest")
    return [Part(name, given.get(name, left / max(1, len(open_names)))) for name in names]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _share(name: str, text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ZooError(f"the share of {name!r} was {text}; it must be above 0 and at most 1")
    return float(text)


class Stream:
    """Rows cut from one stream of tokens [S], in a new order and at a new offset in every epoch.

    `start` are ids that every row begins with: models trained with them lean on them.
    """

    def __init__(self, tokens: Array, length: int, seed: int, start: Sequence[int] = ()) -> None:
        if len(tokens) < length:
            raise ZooError(
                f"the text has {len(tokens)} tokens; one row takes {length}: give more text or a shorter length"
            )
        self.tokens, self.length, self.seed, self.start = tokens, length, seed, list(start)
        self.count = max(1, len(tokens) // length - 1)  # one row of slack for the offset
        self.slack = len(tokens) - self.count * length

    def take(self, indices: Array) -> Array:
        return np.stack([self.row(int(i)) for i in indices]) if len(indices) else np.empty((0, self.length), np.int64)

    def row(self, index: int) -> Array:
        epoch, place = divmod(index, self.count)
        rng = np.random.default_rng((self.seed, epoch))
        offset = int(rng.integers(0, min(self.slack, self.length) + 1))
        start = offset + self.length * int(permuted(self.count, self.seed, epoch)[place])
        row = self.tokens[start : start + self.length].astype(np.int64)
        return np.concatenate([self.start, row])[: self.length].astype(np.int64) if self.start else row


class Pool:
    """Rows [N, L] held in memory, in a new order in every epoch."""

    def __init__(self, rows: Array, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def take(self, indices: Array) -> Array:
        picked = [
            permuted(len(self.rows), self.seed, int(i) // len(self.rows))[int(i) % len(self.rows)] for i in indices
        ]
        return self.rows[picked].astype(np.int64)


class Refreshed:
    """Rows of a pool that is made anew once each of its rows has been used `uses` times.

    Args:
        make: pool number to rows [N, L]; the same number must give the same rows.
        size: N.
    """

    def __init__(self, make: Callable[[int], Array], size: int, uses: int, seed: int) -> None:
        self.make, self.size, self.uses, self.seed = make, size, uses, seed
        self.number, self.pool = -1, Pool(np.empty((0, 0)), seed)

    def take(self, indices: Array) -> Array:
        numbers = indices // (self.size * self.uses)
        parts = [self._pool(int(n)).take(indices[numbers == n] % (self.size * self.uses)) for n in np.unique(numbers)]
        return np.concatenate(parts) if parts else np.empty((0, 0), np.int64)

    def _pool(self, number: int) -> Pool:
        if number != self.number:
            self.number, self.pool = number, Pool(self.make(number), self.seed + number)
        return self.pool


@lru_cache(maxsize=16)
def permuted(count: int, seed: int, epoch: int) -> Array:
    """A random order of `count` things, [count]."""
    return np.random.default_rng((count, seed, epoch)).permutation(count)


class Mixture:
    """Batches drawn from several sources in fixed shares.

    Args:
        sources: by name.
        parts: their shares.
        total: R, the rows of the whole run.
    """

    def __init__(self, sources: Mapping[str, Rows], parts: Sequence[Part], total: int) -> None:
        self.sources, self.parts = sources, parts
        self.owner, self.place = assignment([part.fraction for part in parts], total)

    def batch(self, start: int, stop: int) -> Array:
        """Rows [stop - start, L] at places `start` to `stop` of the run, grouped by source."""
        owner, place = self.owner[start:stop], self.place[start:stop]
        taken = [self.sources[p.name].take(place[owner == n]) for n, p in enumerate(self.parts) if (owner == n).any()]
        return np.concatenate(taken)


@dataclass(frozen=True)
class Feed:
    """The rows of one stage: `count` of a mixture's, from `start` on, as often as asked."""

    mixture: Mixture
    start: int
    count: int

    def batch(self, start: int, stop: int) -> Array:
        """Rows [stop - start, L]; the last lies in the same epoch as the first."""
        start, stop = start % self.count, (stop - 1) % self.count + 1
        return self.mixture.batch(self.start + start, self.start + stop)


def assignment(fractions: Sequence[float], total: int) -> tuple[Array, Array]:
    """For each of `total` rows, its source and its place in that source, both [R].

    Multiples of the golden ratio spread each source evenly: every stretch of the run holds the shares to a row or two.
    """
    spread = ((np.arange(total) + 0.5) * GOLDEN) % 1.0
    owner = np.minimum(np.searchsorted(np.cumsum(fractions), spread, side="right"), len(fractions) - 1)
    place = np.zeros(total, dtype=np.int64)
    for n in range(len(fractions)):
        mine = owner == n
        place[mine] = np.arange(mine.sum())
    return owner, place


def needed_rows(parts: Sequence[Part], total: int) -> dict[str, int]:
    """How many rows a run of `total` rows takes from each source."""
    owner, _ = assignment([part.fraction for part in parts], total)
    return {part.name: int((owner == n).sum()) for n, part in enumerate(parts)}
