"""Greedy answers to many prompts through the model's own cache, without padding.

Prompts of one token count run together, so nothing is ever padded and an answer does not depend on its neighbours.

B batch, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.evals.core import running


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[str],
    *,
    max_new: int,
    batch_tokens: int | None = None,
    label: str = "answers",
) -> list[str]:
    """The greedy continuation of each prompt, as text, in the order of `prompts`.

    A batch stops after `max_new` tokens, or as soon as every row contains its expected string: with substring
    scoring, later tokens cannot change the score.

    Args:
        prompts: token ids.
        expected: per prompt, the string that answers it.
        max_new: most tokens to generate.
        batch_tokens: prompt tokens per batch (default: 16384 on CPU, 131072 on GPU).
    """
    device = running.device_of(model)
    limit = batch_tokens or (131072 if device.type == "cuda" else 16384)
    found = [""] * len(prompts)
    with running.evaluating(model):
        batches = list(_batches(prompts, limit))
        for rows in running.track(batches, label, len(batches)):
            ids = torch.tensor([list(prompts[i]) for i in rows], device=device)
            texts = _continue(model, ids, _reader(tokenizer, [expected[i] for i in rows]), max_new)
            for i, text in zip(rows, texts, strict=True):
                found[i] = text
    return found


def _batches(prompts: Sequence[Sequence[int]], limit: int) -> Iterator[list[int]]:
    """Indices of prompts that share a token count, at most `limit` tokens together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[len(prompt)].append(i)
    for length, rows in sorted(groups.items()):
        size = max(1, limit // length)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _reader(tokenizer: Any, expected: Sequence[str]) -> Callable[[Tensor], tuple[list[str], bool]]:
    def read(ids: Tensor) -> tuple[list[str], bool]:
        texts = tokenizer.batch_decode(ids.tolist(), clean_up_tokenization_spaces=False)
        return texts, all(value in text for value, text in zip(expected, texts, strict=True))

    return read


def _continue(model: Any, ids: Tensor, read: Callable[[Tensor], tuple[list[str], bool]], max_new: int) -> list[str]:
    logits, cache = running.last_logits(model, ids)
    new = logits.argmax(-1, keepdim=True)
    texts, done = read(new)
    while not done and new.shape[1] < max_new:
        logits, cache = running.last_logits(model, new[:, -1:], cache)
        new = torch.cat([new, logits.argmax(-1, keepdim=True)], dim=1)
        texts, done = read(new)
    return texts


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
