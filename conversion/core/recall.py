"""Synthetic documents that teach, and keep, in-context recall: repeated spans, key-value lists, needles in a haystack.

Everything is deterministic per seed. Needle prompts have the form of RULER's niah tasks (https://github.com/NVIDIA/RULER);
their keys come from `TRAIN_WORDS` and made-up words, never from the words that the evals ask for.

Rows are 1-D int32 arrays of token ids; L = row length in tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.conversion.core.words import ADJECTIVES, NOUNS, TRAIN_WORDS

Row = NDArray[np.int32]

CONSONANTS, VOWELS = "b d f g h k l m n p r s t v w z ch sh st tr", "aeiou"
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS.split() for vowel in VOWELS)

INTRODUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
LIST_OPENING, LIST_QUESTION = "Here is a list of keys and values.", "Now repeat the values of these keys."


# ---- keys and values ------------------------------------------------------------------------------------------------
def made_up_word(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 4)))


def word_key(rng: random.Random) -> str:
    """An adjective and a noun of `TRAIN_WORDS`, or in a third of cases two made-up words: unseen keys must work too."""
    if rng.random() < 1 / 3:
        return f"{made_up_word(rng)}-{made_up_word(rng)}"
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def any_key(rng: random.Random) -> str:
    """What a key-value list may use beside word keys: a noun, a name, a code."""
    kind = rng.random()
    if kind < 0.6:
        return word_key(rng)
    if kind < 0.75:
        return rng.choice(NOUNS)
    if kind < 0.9:
        return made_up_word(rng).capitalize()
    return f"{rng.choice('ABCDEFGHJKLMNPQRSTUVWXYZ')}{rng.randint(10, 9999)}"


def number(rng: random.Random) -> str:
    """Seven digits, as in RULER."""
    return str(rng.randint(1_000_000, 9_999_999))


def any_value(rng: random.Random) -> Callable[[random.Random], str]:
    """One kind of value for a whole list: mostly 7-digit numbers."""
    short = rng.choice((99, 999, 9999))
    kinds: tuple[Callable[[random.Random], str], ...] = (
        number,
        lambda r: str(r.randint(0, short)),
        lambda r: r.choice(TRAIN_WORDS),
        made_up_word,
    )
    return rng.choices(kinds, weights=(6, 2, 1, 1))[0]


def distinct(draw: Callable[[random.Random], str], rng: random.Random, n: int) -> list[str]:
    """n different draws, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[draw(rng)] = None
    return list(found)


# ---- documents ------------------------------------------------------------------------------------------------------
def key_value_list(rng: random.Random, min_pairs: int = 4, max_pairs: int = 40, every: bool = False) -> str:
    """4 to 40 lines "key: value", then 3 to 12 or `every` one of them again in another order; most lists say what they
    are."""
    pairs = rng.randint(min_pairs, max_pairs)
    value, mark = any_value(rng), rng.choice((": ", ": ", " = ", " -> "))
    keys = distinct(word_key if rng.random() < 0.5 else any_key, rng, pairs)
    lines = [f"{key}{mark}{value(rng)}" for key in keys]
    asked = rng.sample(lines, pairs if every else min(pairs, rng.randint(3, 12)))
    if rng.random() < 0.75:
        return "\n".join([LIST_OPENING, *lines, LIST_QUESTION, *asked])
    return "\n".join([*lines, "", *asked])


def sentences(text: str) -> list[str]:
    """Sentences of a text with its white space collapsed; the units between which needles go."""
    return re.sub(r"([.!?][\"')]*) ", r"\1\n", " ".join(text.split())).split("\n")


def haystack(rng: random.Random, filler: Sequence[str], needles: Sequence[str], chars: int) -> str:
    """About `chars` characters of consecutive filler sentences with the needles between them at random depths."""
    start, chosen, room = rng.randrange(len(filler)), [], chars
    for sentence in islice(cycle(filler), start, start + len(filler)):
        if room <= 0:
            break
        chosen.append(sentence)
        room -= len(sentence) + 1
    for needle in needles:
        chosen.insert(rng.randint(0, len(chosen)), needle)
    return " ".join(chosen)


def needle_prompt(context: str, key: str) -> str:
    """RULER's niah prompt with the forced start of the answer; the answer is " " and the value."""
    return f"{INTRODUCTION}\n{context}\n{QUESTION.format(key=key)}"


def needle_document(rng: random.Random, filler: Sequence[str], chars: int) -> str:
    """1 to 8 needles in about `chars` characters of filler, then 1 to 3 questions with their answers."""
    keys = distinct(word_key, rng, rng.choice((1, 1, 2, 3, 4, 6, 8)))
    values = {key: number(rng) for key in keys}
    needles = [NEEDLE.format(key=key, value=value) for key, value in values.items()]
    asked = rng.sample(keys, min(len(keys), rng.randint(1, 3)))
    text = needle_prompt(haystack(rng, filler, needles, chars), asked[0]) + f" {values[asked[0]]}."
    return text + "".join(f"\n{QUESTION.format(key=key)} {values[key]}." for key in asked[1:])


# ---- rows of tokens -------------------------------------------------------------------------------------------------
def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens, by the fast tokenizer's batch path where there is one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def repeat_row(rng: random.Random, text: Sequence[int] | Row, vocab: int, length: int) -> Row:
    """One span of 12 to 400 tokens tiled over the row: half the time random tokens, half the time text. Shape [L]."""
    size = rng.randint(12, min(400, max(12, length // 2), len(text)))
    start = rng.randint(0, len(text) - size)
    span = rng.choices(range(2, vocab), k=size) if rng.random() < 0.5 else text[start : start + size]
    return np.resize(np.asarray(span, dtype=np.int32), length)


def recall_documents(
    rng: random.Random, filler: Sequence[str], length: int, ratio: float, lists: float, every: bool = False
) -> Iterator[str]:
    """A share `lists` of key-value lists, which ask for 3 to 12 or `every` entry, else needle documents of 128 to
    `length` tokens; `ratio` is characters per token."""
    longest = max(129, length - 160)
    while True:
        if rng.random() < lists:
            yield key_value_list(rng, 4, max(4, min(40, length // 24)), every)
        else:
            tokens = 128 * (longest / 128) ** rng.random()
            yield needle_document(rng, filler, max(0, int(ratio * (tokens - 100))))


def recall_rows(
    filler: str, tokenizer: Any, length: int, seed: int, lists: float = 0.6, every: bool = False
) -> Iterator[Row]:
    """Endless rows [L] of whole recall documents, each preceded by the end token; the rest of a row is filler text."""
    rng, parts = random.Random(seed), sentences(filler)
    text = np.asarray(encode(tokenizer, [filler])[0], dtype=np.int32)
    documents = recall_documents(rng, parts, length, len(filler) / len(text), lists, every)
    waiting: list[list[int]] = []
    while True:
        while len(waiting) < 64:
            fresh = encode(tokenizer, list(islice(documents, 256)))
            waiting += [ids for ids in fresh if len(ids) < length]
        yield pack(rng, waiting, text, tokenizer.eos_token_id, length)


def pack(rng: random.Random, waiting: list[list[int]], text: Row, end: int, length: int) -> Row:
    """Takes the first waiting documents that fit; what is left at the end is a slice of text."""
    row: list[int] = []
    while (i := next((i for i, ids in enumerate(waiting) if len(ids) < length - len(row)), None)) is not None:
        row += [end, *waiting.pop(i)]
        if not waiting:
            break
    start = rng.randint(0, max(0, len(text) - length))
    rest = np.resize(text[start : start + length], length)
    return np.concatenate([np.asarray([*row, end], dtype=np.int32), rest])[:length]


# ---- probes ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Probe:
    """A document whose last tokens, from `start` on, are an answer that stands earlier in it."""

    ids: list[int]
    start: int


def needle_probe(rng: random.Random, filler: Sequence[str], keys: Sequence[str], tokenizer: Any, length: int) -> Probe:
    """One needle with one of `keys`; prompt and answer together take at most `length` tokens."""
    key, value = rng.choice(list(keys)), number(rng)
    needle, chars = NEEDLE.format(key=key, value=value), length * 5
    while True:
        prompt = needle_prompt(haystack(rng, filler, [needle], chars), key)
        head, ids = encode(tokenizer, [prompt, f"{prompt} {value}"])
        if len(ids) <= length:
            return Probe(ids, len(head))
        if chars == 0:
            raise ValueError(f"length must hold the needle and its question, {len(ids)} tokens; got {length}")
        chars = max(0, chars - max(16, 3 * (len(ids) - length)))


def key_value_probe(rng: random.Random, keys: Sequence[str], tokenizer: Any, pairs: int) -> Probe:
    """`pairs` lines "key: value" and one key asked again."""
    chosen = rng.sample(list(keys), pairs)
    values = [number(rng) for _ in chosen]
    asked = rng.randrange(pairs)
    prompt = "\n".join([*(f"{k}: {v}" for k, v in zip(chosen, values, strict=True)), "", f"{chosen[asked]}:"])
    head, ids = encode(tokenizer, [prompt, f"{prompt} {values[asked]}"])
    return Probe(ids, len(head))


def answer_accuracy(predict: Callable[[NDArray[np.int64]], NDArray[np.int64]], probes: Sequence[Probe]) -> float:
    """Share of probes whose whole answer is right, teacher-forced.

    `predict` maps ids [B, L], padded on the right with zeros, to the predicted next id at every place, [B, L].
    """
    longest = max(len(probe.ids) for probe in probes)
    rows = np.zeros((len(probes), longest), dtype=np.int64)
    for row, probe in zip(rows, probes, strict=True):
        row[: len(probe.ids)] = probe.ids
    guesses = predict(rows)
    right = [
        guess[probe.start - 1 : len(probe.ids) - 1].tolist() == probe.ids[probe.start :]
        for guess, probe in zip(guesses, probes, strict=True)
    ]
    return sum(right) / len(right)
