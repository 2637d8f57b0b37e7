"""Conversations as rows: JSON lines with `messages`, through the tokenizer's chat template; replies alone are learned.

N rows, L tokens per row.
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from zoo.conversion.core.rows import Array, hide
from zoo.errors import ZooError

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what encloses a reply in a template, where its author put it
REASONING = "reasoning_content"


def is_chat(name: str) -> bool:
    """Whether a source of data is a file of conversations."""
    return name.endswith(".jsonl")


def chat_rows(name: str, tokenizer: Any, length: int, seed: int) -> Array:
    """Rows [N, L] of a file, several conversations in each, with all but the replies hidden (see `rows.hide`).

    A conversation that is longer than a row is cut off there; the end of a row that none fits is padding.

    Raises:
        ZooError: a line without messages, a tokenizer that has no chat template, or nothing to learn.
    """
    template = template_of(tokenizer)
    found = [encode(tokenizer, template, *line)[:length] for line in conversations(Path(name).expanduser(), template)]
    found = [ids for ids in found if (ids >= 0).any()]
    if not found:
        raise ZooError(f"data {name} has no reply of an assistant in the first {length} tokens of a conversation")
    known = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    return packed(found, length, ~next((token for token in known if token is not None), 0), seed)


def template_of(tokenizer: Any) -> str:
    """The chat template.

    Raises:
        ZooError: none, or a tokenizer that does not tell where its tokens lie in the text.
    """
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        raise ZooError(
            "data with messages needs a chat template; put the model's chat_template.jinja beside its tokenizer"
        ) from None
    if not tokenizer.is_fast:
        raise ZooError("data with messages needs a tokenizer with offsets; put the model's tokenizer.json there")
    return template


def conversations(path: Path, template: str) -> Iterator[tuple[list[dict[str, Any]], str]]:
    """Messages of each line, and where they stand.

    Raises:
        ZooError: a line that has none, or reasoning that the template leaves out.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"data {path}, line {number}"
            try:
                entry = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise ZooError(f"{where} is no JSON ({error})") from None
            if entry is not None:
                yield messages_of(entry, where, template), where


def messages_of(entry: Any, where: str, template: str) -> list[dict[str, Any]]:
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ZooError(f"{where} has no messages; each line is like {{'messages': [{{'role': ..., 'content': ...}}]}}")
    if REASONING not in template and any(message.get(REASONING) for message in messages):
        raise ZooError(f"{where} has {REASONING}, which the chat template leaves out; write it into content")
    return messages


def encode(tokenizer: Any, template: str, messages: list[dict[str, Any]], where: str) -> Array:
    """Ids of a conversation, hidden where the next token is no assistant's."""
    try:
        ids, reply = (marked if MARK.search(template) else by_prefixes)(tokenizer, messages, where)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ZooError(f"{where} does not fit the chat template ({error})") from None
    learned = np.append(np.array(reply, dtype=bool)[1:], False)  # what follows the last token is another text
    return hide(np.array(ids, dtype=np.int64), learned)


def marked(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> tuple[Sequence[int], Sequence[bool]]:
    """Ids, and which of them the template marks as an assistant's."""
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    return found["input_ids"], found["assistant_masks"]


def by_prefixes(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> tuple[Sequence[int], Sequence[bool]]:
    """Ids, and which of them lie in what the template adds to the text before a reply when it gets the reply."""

    def rendered(count: int, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        return text

    whole, spans = rendered(len(messages)), []
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = rendered(n, prompt=True), rendered(n + 1)
            if not (whole.startswith(after) and after.startswith(before)):
                raise ZooError(
                    f"{where}: the chat template writes message {n + 1} otherwise once more follow; "
                    "end the conversation there, or put {% generation %} marks into the template"
                )
            spans.append((len(before), len(after)))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in found["offset_mapping"]]
    return found["input_ids"], [any(first <= start < last for first, last in spans) for start in starts]


def packed(parts: list[Array], length: int, filler: int, seed: int) -> Array:
    """Rows [N, L] of whole parts, each where the least room is left, longest first; rows end in `filler`."""
    order = sorted(range(len(parts)), key=lambda n: -len(parts[n]))
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left of a row, and which
    for n in order:
        at = bisect_left(rooms, (len(parts[n]), -1))
        room, row = rooms.pop(at) if at < len(rooms) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(n)
        insort(rooms, (room - len(parts[n]), row))
    result = np.full((len(rows), length), filler, dtype=np.int32)
    shuffler = random.Random(seed)
    for row, members in enumerate(rows):
        shuffler.shuffle(members)  # else every row would begin with its longest
        joined = np.concatenate([parts[n] for n in members])
        result[row, : len(joined)] = joined
    return result
