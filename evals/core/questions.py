"""Tasks that put a question in text: prompts fitted to a length, and the samples made of the model's answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.decoding import Continue, answer_tokens, answers
from zoo.evals.core.records import Record
from zoo.evals.core.text import bos_ids, encode

DEPTHS = (0, 25, 50, 75, 100)
_ROUNDS = 12
_SHOWN = 4096


@dataclass(frozen=True)
class Question:
    """One sample: a prompt, what answers it, and where it belongs."""

    text: str
    answer: str
    at: Mapping[str, int | str]


def ask(
    model: Any,
    tokenizer: Any,
    task: str,
    questions: Sequence[Question],
    score: Callable[[str, str], bool],
    *,
    slack: int = 2,
    stop: Sequence[str] = (),
    batch_tokens: int | None = None,
) -> list[Record]:
    """One record per question: `accuracy` is `score(output, answer)`.

    Args:
        slack: tokens to generate beyond those of an answer.
        stop: strings before which an answer ends.

    Raises:
        ZooError: a prompt and its answer are longer than the model allows.
    """
    bos = bos_ids(tokenizer)
    prompts = [bos + encode(tokenizer, question.text) for question in questions]
    max_new = answer_tokens(tokenizer, [question.answer for question in questions], slack)
    running.check_length(model, max(map(len, prompts)) + max_new, task)
    requests = [Continue(ids, max_new, stop=stop) for ids in prompts]
    found = answers(model, tokenizer, requests, batch_tokens=batch_tokens, label=task)
    return [
        Record(
            id=f"{'/'.join(str(value) for key, value in question.at.items() if key != 'depth')}/{i}",
            scores={"accuracy": score(output, question.answer)},
            at=question.at,
            prompt=question.text[-_SHOWN:],
            output=output,
            answers=(question.answer,),
            tokens=len(ids),
        )
        for i, (question, ids, output) in enumerate(zip(questions, prompts, found, strict=True))
    ]


def fitted(text: Callable[[int], str], tokenizer: Any, budget: int, task: str) -> str:
    """`text(n)` for about the largest n that has at most `budget` tokens; it must grow evenly with n.

    Raises:
        ZooError: not even `text(0)` fits.
    """
    room = budget - len(bos_ids(tokenizer))
    best, found = 0, len(encode(tokenizer, text(0)))
    if found > room:
        raise ZooError(f"task {task!r}: its shortest prompt has {found} tokens, {room} are left for it; ask for more")
    least = found
    count = 64
    for _ in range(_ROUNDS):
        tokens = len(encode(tokenizer, text(count)))
        if tokens <= room and count >= best:
            best, found = count, tokens
        each = max(1e-3, (tokens - least) / count)
        step = int((room - tokens) / each) or (-1 if tokens > room else 0)
        if step == 0 or count + step == best:
            break
        count = max(1, count + step)
    return text(best)


def check_depths(task: str, depths: Sequence[int]) -> None:
    """Raise `ZooError` unless `depths` are percent."""
    if not depths or not all(0 <= depth <= 100 for depth in depths):
        raise ZooError(f"task {task!r}: depths was {list(depths)}; it must be percents between 0 and 100")


def check_sizes(task: str, name: str, sizes: Sequence[int], least: int, most: int) -> None:
    """Raise `ZooError` for no sizes or one beyond what the task can make."""
    if not sizes:
        raise ZooError(f"task {task!r}: {name} was []; give at least one")
    for size in sizes:
        if not least <= size <= most:
            raise ZooError(f"task {task!r}: {name} was {size}; it must be between {least} and {most}")
