"""Greedy answers to prompts through the model's own cache.

B batch, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from zoo.evals.core import running
from zoo.evals.core.requests import Request, outputs


@dataclass(frozen=True)
class Continue(Request):
    """The greedy continuation of `ids`; its output is text.

    Args:
        max_new: most tokens to generate.
        until: strings; once all of them stand in the text it ends: with substring scoring, what follows cannot change
            the score.
        stop: strings; the text ends before the first of them.
    """

    max_new: int = 32
    until: Sequence[str] = ()
    stop: Sequence[str] = ()
    kind: ClassVar[str] = "continue"

    @property
    def blank(self) -> str:
        return ""

    def score(self, output: str) -> float | None:
        """Whether everything that is looked for is there."""
        return float(all(contains(output, value) for value in self.until)) if self.until else None

    def cut(self, text: str) -> tuple[str, bool]:
        """The text up to its end, and whether it has ended."""
        ends = [text.find(mark) for mark in self.stop if mark in text]
        if ends:
            return text[: min(ends)], True
        return text, bool(self.until) and all(contains(text, value) for value in self.until)


def answers(
    model: Any, tokenizer: Any, requests: Sequence[Continue], *, batch_tokens: int | None = None, label: str = "answers"
) -> list[str]:
    """The greedy continuation of each prompt, as text, in the order of `requests`.

    Generation ends at the tokenizer's end-of-text token too, where the model's config names none.

    Args:
        batch_tokens: prompt tokens per batch (default: 16384 on CPU, 131072 on GPU).
    """
    return outputs(model, requests, batch_tokens=batch_tokens, label=label, run=partial(_continue, tokenizer=tokenizer))


def _continue(model: Any, requests: Sequence[Continue], tokenizer: Any) -> list[str]:
    ids = torch.tensor([list(request.ids) for request in requests], device=running.device_of(model))
    texts: list[str | None] = [None] * len(requests)
    end = _end(model, tokenizer)
    logits, cache = running.last_logits(model, ids)
    new = logits.argmax(-1, keepdim=True)
    while True:
        for i, (request, tokens) in enumerate(zip(requests, new.tolist(), strict=True)):
            if texts[i] is None and len(tokens) <= request.max_new:
                texts[i] = _text(request, tokens, end, tokenizer)
        if None not in texts:
            return [text for text in texts if text is not None]
        logits, cache = running.last_logits(model, new[:, -1:], cache)
        new = torch.cat([new, logits.argmax(-1, keepdim=True)], dim=1)


def _text(request: Continue, tokens: list[int], end: set[int], tokenizer: Any) -> str | None:
    """The answer once it has ended."""
    ended = tokens[-1] in end
    shown = tokens[:-1] if ended else tokens
    text, cut = request.cut(tokenizer.decode(shown, clean_up_tokenization_spaces=False))
    return text if cut or ended or len(tokens) >= request.max_new else None


def _end(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text."""
    found = getattr(model.config, "eos_token_id", None)
    found = getattr(tokenizer, "eos_token_id", None) if found is None else found
    return set(found) if isinstance(found, list | tuple) else set() if found is None else {found}


def contains(answer: str, value: str) -> bool:
    """RULER's score of one reference: a case-insensitive substring, control characters read as line breaks."""
    return value.lower() in re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()


def first_number(answer: str) -> str:
    """The first run of digits."""
    match = re.search(r"\d+", answer)
    return match.group() if match else ""


def answer_tokens(tokenizer: Any, values: Sequence[str], slack: int) -> int:
    """Tokens to generate: the longest of `values` after a space, and `slack` for a word or mark before it."""
    return max(len(ids) for ids in tokenizer([f" {v}" for v in values], add_special_tokens=False)["input_ids"]) + slack
