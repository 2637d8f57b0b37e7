"""Prompts of RULER's niah_single_2 task, fitted to a length in tokens.

The prompt strings are those of RULER (NVIDIA, https://github.com/NVIDIA/RULER, Apache-2.0; Hsieh et al. 2024,
arXiv:2404.06654) in their singular form. Two deviations: the haystack is the user's text instead of Paul Graham's
essays, and every sample starts at another sentence of it.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from zoo.errors import ZooError
from zoo.evals.core.text import bos_ids, clean_words

TASK = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{context}\nWhat is the special magic number for {key} mentioned in the provided text?"
)
ANSWER_PREFIX = " The special magic number for {key} mentioned in the provided text is"
NEEDLE = "One of the special magic numbers for {key} is: {value}."
DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # percent, RULER's 40 depths
MAX_CHARS = 4_000_000
_ROUNDS = 12
_MOVES = 20  # sentences to try when a long word at the end keeps a prompt from its length
_PROBE = 5000  # words


@dataclass(frozen=True)
class Question:
    """One sample before its length is fixed: `start` indexes the haystack's words, `depth` is in percent."""

    key: str
    value: str
    depth: int
    start: int


def least(budget: int) -> int:
    """The shortest prompt that counts as `budget` tokens long: within 1%, or 8 tokens of a short one."""
    return budget - max(8, budget // 100)


class Haystack:
    """Text as words, with an estimate of the tokens before each, so that few trials meet a length."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        words = clean_words(text[:MAX_CHARS], getattr(tokenizer, "all_special_tokens", []))
        self.tokenizer, self.bos = tokenizer, bos_ids(tokenizer)
        self.starts = [0] + [i + 1 for i, word in enumerate(words[:-1]) if re.search(r"[.!?][\"')\]”’]*$", word)]
        self.words = words * 2  # twice: a haystack may run over the end of the text
        probe = " ".join(words[:_PROBE])
        ratio = len(self._encode([probe])[0]) / max(1, len(probe))
        self.before = list(accumulate((ratio * (len(word) + 1) for word in self.words), initial=0.0))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def prompts(self, questions: Sequence[Question], budget: int) -> list[list[int]]:
        """Per question a prompt of at most `budget` tokens that fills it, but for a few.

        A haystack whose next word is too long to fit begins at a later sentence instead.

        Raises:
            ZooError: the budget has no room for the needle and its question, or the text is too short for it.
        """
        asked = list(questions)
        fitted = self._fit(asked, budget)
        for _ in range(_MOVES):
            short = [i for i, ids in enumerate(fitted) if len(ids) < least(budget)]
            for i in short:
                asked[i] = replace(asked[i], start=self._later(asked[i].start))
            for i, ids in zip(short, self._fit([asked[i] for i in short], budget) if short else [], strict=True):
                fitted[i] = ids
        if min(map(len, fitted)) < least(budget):
            have = len(self.words) // 2
            raise ZooError(f"a haystack of {budget} tokens cannot be filled from {have} words; pass a longer text")
        return fitted

    def _later(self, start: int) -> int:
        """Where the sentence after the one at `start` begins."""
        return self.starts[bisect_right(self.starts, start) % len(self.starts)]

    def _fit(self, questions: Sequence[Question], budget: int) -> list[list[int]]:
        """The longest prompts found, of at most `budget` tokens."""
        fitted: list[list[int]] = [[] for _ in questions]
        aims = [float(budget - len(ids)) for ids in self._ids(questions, [0] * len(questions))]
        if min(aims) < 0:
            raise ZooError(f"a needle prompt needs at least {budget - int(min(aims))} tokens, {budget} are left for it")
        counts = [self._count(question, aim) for question, aim in zip(questions, aims, strict=True)]
        open_ = list(range(len(questions)))
        for _ in range(_ROUNDS):
            trial = self._ids([questions[i] for i in open_], [counts[i] for i in open_])
            for i, ids in zip(open_, trial, strict=True):
                if len(fitted[i]) < len(ids) <= budget:
                    fitted[i] = ids
                aims[i] += budget - len(ids)
                counts[i] = self._count(questions[i], aims[i])
            open_ = [i for i in open_ if len(fitted[i]) != budget]
            if all(len(fitted[i]) > budget - max(4, budget // 200) for i in open_):
                break
        return fitted

    def _ids(self, questions: Sequence[Question], counts: Sequence[int]) -> list[list[int]]:
        texts = [self.text(question, count) for question, count in zip(questions, counts, strict=True)]
        return [self.bos + ids for ids in self._encode(texts)]

    def _count(self, question: Question, tokens: float) -> int:
        """How many words from the question's start make about `tokens` tokens."""
        aim = self.before[question.start] + max(0.0, tokens)
        return min(bisect_right(self.before, aim) - 1 - question.start, len(self.words) // 2)

    def text(self, question: Question, count: int) -> str:
        """The whole prompt over `count` words of haystack, with the needle between two of its sentences."""
        words = self.words[question.start : question.start + count]
        sentences = split_sentences(words)
        at = int(len(sentences) * question.depth / 100)
        needle = NEEDLE.format(key=question.key, value=question.value)
        context = " ".join([*sentences[:at], needle, *sentences[at:]])
        return TASK.format(context=context, key=question.key) + ANSWER_PREFIX.format(key=question.key)

    def questions(self, keys: Sequence[str], length: int, samples: int, seed: int) -> list[Question]:
        """`samples` questions; sample i depends on (length, i, seed) alone."""
        return [self._question(random.Random(f"needle/{length}/{i}/{seed}"), keys) for i in range(samples)]

    def _question(self, rng: random.Random, keys: Sequence[str]) -> Question:
        value = str(rng.randint(1_000_000, 9_999_999))
        return Question(rng.choice(keys), value, rng.choice(DEPTHS), rng.choice(self.starts))


def split_sentences(words: Sequence[str]) -> list[str]:
    """Words joined into sentences, which end in . ! or ? and perhaps a closing quote or bracket."""
    text = " ".join(words)
    return re.split(r"(?<=[.!?])\s|(?<=[.!?][\"')\]”’])\s", text) if text else []
