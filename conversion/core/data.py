"""Where the rows of a healing run come from: text, conversations, recall, lists, the teacher itself, or shares of each.

N rows, L tokens per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.conversion.core.chat import chat_rows, is_chat
from zoo.conversion.core.recall_pool import KINDS, recall_pool
from zoo.conversion.core.rows import Array, Mixture, Part, Pool, Refreshed, Rows, Stream, needed_rows, parse
from zoo.conversion.core.sampling import sample_rows
from zoo.conversion.core.texts import cached, fingerprint, opening, prefix, text_tokens, token_dtype
from zoo.errors import ZooError

FILLER = 4_000_000  # characters of text among which needles are hidden


@dataclass(frozen=True)
class Plan:
    """What a run asks of its data.

    Args:
        length: L.
        total: rows of the whole run.
        seed: of every random choice.
        cache: directory for tokens and pools.
        pool_tokens, pool_uses: of `self`: tokens sampled at a time, and how often each row is used.
        sample_batch: rows sampled together.
        say: told what takes time.
    """

    length: int
    total: int
    seed: int
    cache: Path
    pool_tokens: int = 131_072
    pool_uses: int = 6
    sample_batch: int = 128
    say: Callable[[str], None] = field(default=lambda text: None)


def check(data: str) -> list[Part]:
    """The parts of `data`; a file that is missing raises `ZooError` before anything is loaded."""
    parts = [Part(data, 1.0)] if Path(data).expanduser().exists() else parse(data)
    for part in parts:
        if not is_text(part.name) or part.name.startswith("datasets:"):
            continue
        path = Path(part.name).expanduser()
        if not path.exists():
            known = "a text file, a .jsonl of messages, a directory, datasets:NAME, recall, lists or self"
            raise ZooError(f"data {part.name!r} does not exist; give {known}")
        if path.is_file() and path.stat().st_size == 0:
            raise ZooError(f"data {path} is empty; give a file that holds text")
    return parts


def is_text(name: str) -> bool:
    return name != "self" and name not in KINDS


def mixture(parts: list[Part], teacher: Any, tokenizer: Any, plan: Plan) -> Mixture:
    """The run's rows. Tokenising, and recall rows, happen here; sampling from the teacher happens when a pool is due.

    Raises:
        ZooError: text that is missing, empty or shorter than a row; conversations that cannot be used.
    """
    needed = needed_rows(parts, plan.total)
    sources: dict[str, Rows] = {}
    for part in parts:
        if is_chat(part.name):
            sources[part.name] = talked(part.name, tokenizer, plan)
        elif is_text(part.name):
            wanted = (needed[part.name] + 2) * plan.length
            plan.say(f"tokenising {part.name}")
            tokens = text_tokens(part.name, tokenizer, wanted, plan.seed, plan.cache)
            sources[part.name] = Stream(tokens, plan.length, plan.seed, opening(tokenizer))
        elif part.name == "self":
            sources[part.name] = sampled(teacher, tokenizer, plan, needed[part.name])
    for kind in (name for name in KINDS if name in needed):
        sources[kind] = recalled(teacher, tokenizer, plan, kind, needed[kind], sources)
    return Mixture(sources, parts, plan.total)


def sampled(teacher: Any, tokenizer: Any, plan: Plan, needed: int) -> Refreshed:
    """Pools sampled from the teacher, each kept in the cache so that a resumed run does not sample again."""
    size = max(1, min(needed, math.ceil(needed / plan.pool_uses), plan.pool_tokens // plan.length))
    start = prefix(tokenizer)
    weights = float(teacher.model.embed_tokens.weight.float().square().sum())  # a shared cache may hold other teachers'
    key = fingerprint("self", tokenizer, weights, plan.length, size, plan.seed)

    def make(number: int) -> Array:
        def draw() -> Array:
            plan.say(f"sampling {size * plan.length:,} tokens from the teacher")
            rows = sample_rows(teacher, start, size, plan.length, plan.seed + number, plan.sample_batch)
            return rows.astype(token_dtype(tokenizer))

        return cached(plan.cache / f"self-{key}-{number}.npy", draw)

    return Refreshed(make, size, plan.pool_uses, plan.seed)


def talked(name: str, tokenizer: Any, plan: Plan) -> Pool:
    """Rows of conversations, of which the replies are learned."""
    key = fingerprint(name, tokenizer, tokenizer.chat_template, plan.length, plan.seed)

    def write() -> Array:
        plan.say(f"tokenising {name}")
        return chat_rows(name, tokenizer, plan.length, plan.seed)

    return Pool(cached(plan.cache / f"chat-{key}.npy", write), plan.seed)


def recalled(teacher: Any, tokenizer: Any, plan: Plan, kind: str, needed: int, sources: dict[str, Rows]) -> Pool:
    """Recall rows whose filler is the run's own text."""
    filler = filler_text(teacher, tokenizer, plan, sources)
    key = fingerprint(kind, tokenizer, filler, needed, plan.length, plan.seed)

    def write() -> Array:
        plan.say(f"writing {needed * plan.length:,} tokens of {kind} documents")
        rows, start = recall_pool(tokenizer, filler, needed, plan.length, plan.seed, kind=kind), opening(tokenizer)
        rows[:, : len(start)] = start
        return rows.astype(token_dtype(tokenizer))

    return Pool(cached(plan.cache / f"{kind}-{key}.npy", write), plan.seed)


def filler_text(teacher: Any, tokenizer: Any, plan: Plan, sources: dict[str, Rows]) -> str:
    """Text of the first source, decoded; with none, text sampled from the teacher."""
    streams = [source for source in sources.values() if isinstance(source, Stream)]
    if streams:
        ids = streams[0].tokens[: FILLER // 4]
    else:
        rows = sources.get("self") or sampled(teacher, tokenizer, plan, max(1, 65_536 // plan.length))
        ids = rows.take(np.arange(max(1, 65_536 // plan.length))).reshape(-1)
    text: str = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    return text[:FILLER]
