"""Text files and the windows of tokens cut from them."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError

SUFFIXES = (".txt", ".md", ".xz")


def read_text(data: str | Path | None, task: str) -> str:
    """The text of `data`, a .txt, .md or .xz file.

    Raises:
        ZooError: no data, a missing or empty file, another kind of file, or bytes that are not UTF-8 text.
    """
    if data is None:
        raise ZooError(f"task {task!r} needs text and none was given; pass --data FILE (.txt, .md or .xz)")
    path = Path(data)
    if not path.is_file():
        raise ZooError(f"data file {str(path)!r} does not exist; pass --data with a .txt, .md or .xz file")
    if path.suffix not in SUFFIXES:
        raise ZooError(f"data file {str(path)!r} ends in {path.suffix!r}; it must be one of {', '.join(SUFFIXES)}")
    text = _decode(path)
    if not text.strip():
        raise ZooError(f"data file {str(path)!r} is empty; pass a file with text in it")
    return text


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ZooError(f"data file {str(path)!r} cannot be read as UTF-8 text ({error}); check the file") from error


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` without special tokens around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def bos_ids(tokenizer: Any) -> list[int]:
    """`[bos]` if the tokenizer puts a beginning-of-sequence token before text by itself, else `[]`."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos] else []


@dataclass(frozen=True)
class Windows:
    """Non-overlapping windows: the model reads `rows[:, :-1]` and is scored on `rows[:, 1:]`.

    Args:
        rows: `[windows, length + 1]` int64; every token of the text is scored once, the first one only under a BOS.
        n_bytes: UTF-8 bytes of the scored tokens.
        skipped: tokens after the last whole window.
    """

    rows: Tensor
    n_bytes: int
    skipped: int


def windows(text: str, tokenizer: Any, length: int, limit: int | None = None) -> Windows:
    """Cut `text` into windows of `length` scored tokens, at most `limit`.

    A tokenizer that starts text with a BOS token gets one at the start of every window, as context that is not scored;
    otherwise a window starts with the last token of the one before.

    Raises:
        ZooError: the text has fewer tokens than one window.
    """
    bos = bos_ids(tokenizer)
    # tokens are at least a fraction of a byte: a slice is enough when few windows are wanted
    text = text if limit is None else text[: (limit + 1) * (length + 1) * 16]
    ids = encode(tokenizer, text)
    overlap = 1 - len(bos)
    count = (len(ids) - overlap) // length
    if count < 1:
        raise ZooError(
            f"data has {len(ids)} tokens, one window needs {length + overlap}; pass a longer text or a smaller length"
        )
    count = count if limit is None else min(count, limit)
    rows = [bos + ids[i * length : (i + 1) * length + overlap] for i in range(count)]
    scored = ids[overlap : overlap + count * length]
    n_bytes = len(tokenizer.decode(scored, clean_up_tokenization_spaces=False).encode())
    return Windows(torch.tensor(rows), n_bytes, len(ids) - overlap - count * length)


def buckets(length: int, count: int = 16) -> list[tuple[int, int]]:
    """`count` equal ranges of positions [start, end), fewer for a short window."""
    count = min(count, length)
    edges = [round(i * length / count) for i in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def clean_words(text: str, special: Sequence[str]) -> list[str]:
    """The whitespace-separated words of `text`, without the tokenizer's special tokens."""
    for token in special:
        text = text.replace(token, " ")
    return text.split()
