"""Text as tokens: files, directories and data sets, cut into pieces, encoded on all cores and kept in a cache.

A token array is one stream [S]: every document (and every piece that does not follow on) starts with the prefix.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from zoo.conversion.core.recall import encode
from zoo.errors import ZooError

Tokens = NDArray[Any]

SUFFIXES = (".txt", ".md", ".text", ".xz")
PIECE = 65536  # characters; a piece stays whole when the text is shuffled


def read_text(path: Path) -> str:
    """The text of a file, `.xz` unpacked.

    Raises:
        ZooError: the file is missing, empty, not text, or a broken archive.
    """
    try:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise ZooError(
            f"data {str(path)!r} does not exist; give a text file, a directory, datasets:NAME, recall, lists or self"
        ) from None
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ZooError(
            f"data {path} cannot be read as UTF-8 text ({error}); give a text file or an .xz of one"
        ) from None
    if not text.strip():
        raise ZooError(f"data {path} is empty; give a file that holds text")
    return text


def documents(name: str, end: str, characters: int) -> list[str]:
    """The documents of a file, a directory or `datasets:NAME[:SPLIT]`; `end` is the text of the end token.

    Of a data set no more than `characters` are read.
    """
    if name.startswith("datasets:"):
        return list(dataset_documents(name, characters))
    path = Path(name).expanduser()
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise ZooError(f"data {path} holds no text; a directory must have files ending in {', '.join(SUFFIXES)}")
    found = (part.strip() for file in files for part in split(read_text(file), end))
    return [part for part in found if part]


def split(text: str, end: str) -> list[str]:
    """The documents between end tokens, which data files may spell out."""
    return text.split(end) if end else [text]


def dataset_documents(name: str, characters: int) -> Iterator[str]:
    """The text column of `datasets:NAME[:SPLIT]`, streamed until `characters` have been read."""
    import datasets

    _, repository, *rest = name.split(":")
    try:
        rows = datasets.load_dataset(repository, split=rest[0] if rest else "train", streaming=True)
        for row in rows:
            column = (
                "text" if "text" in row else next((key for key, value in row.items() if isinstance(value, str)), None)
            )
            if column is None:
                raise ZooError(f"data {name!r} has no column of text; it has {', '.join(row)}")
            yield row[column]
            characters -= len(row[column])
            if characters <= 0:
                return
    except ZooError:
        raise
    except Exception as error:  # the hub, the network and dataset scripts raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ZooError(f"data {name!r} cannot be loaded ({reason}); check its name and the network") from None


def pieces(document: str, size: int = PIECE) -> Iterator[str]:
    """Cuts before a blank line, where tokenising the parts gives the tokens of the whole."""
    start = 0
    while start < len(document):
        stop = document.find("\n\n", start + size)
        stop = len(document) if stop < 0 else stop
        yield document[start:stop]
        start = stop


def selection(texts: Iterable[str], characters: int, seed: int) -> list[str]:
    """Pieces of all documents in a random order, cut after `characters`: a small budget still sees every book."""
    parts = [piece for text in texts for piece in pieces(text)]
    random.Random(seed).shuffle(parts)
    room, kept = characters, []
    for part in parts:
        kept.append(part)
        room -= len(part)
        if room <= 0:
            break
    return kept


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text, if anything."""
    start = list(tokenizer("")["input_ids"])
    # some tokenizers close a text too
    return start[:-1] if start and start[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else start


def prefix(tokenizer: Any) -> list[int]:
    """The border between documents: what the tokenizer puts before a text, else its begin or end token."""
    known = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return opening(tokenizer) or [next((token for token in known if token is not None), 0)]


def token_dtype(tokenizer: Any) -> type[np.uint16] | type[np.uint32]:
    """The narrowest type that holds every id."""
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32


def tokenize(parts: Iterable[str], tokenizer: Any, batch: int = 256) -> Tokens:
    """One stream [S] of all parts, each after the prefix. Encodes `batch` parts at a time, on every core."""
    start, stream = prefix(tokenizer), []
    remaining = iter(parts)
    while chunk := list(islice(remaining, batch)):
        stream += [np.array([*start, *ids], dtype=token_dtype(tokenizer)) for ids in encode(tokenizer, chunk)]
    return np.concatenate(stream)


def text_tokens(name: str, tokenizer: Any, needed: int, seed: int, cache: Path) -> Tokens:
    """The stream [S] of a text source, from `cache` when the same was asked before.

    Args:
        name: file, directory or `datasets:NAME[:SPLIT]`.
        needed: tokens after which it may stop.
    """
    # English takes about 4 characters a token; with 8 even a good tokenizer finds its `needed` tokens in the selection
    characters = 8 * needed
    file = cache / f"text-{fingerprint(name, tokenizer, characters, seed)}.npy"
    return cached(
        file,
        lambda: tokenize(
            selection(documents(name, tokenizer.eos_token or "", characters), characters, seed), tokenizer
        ),
    )


def fingerprint(name: str, tokenizer: Any, *rest: Any) -> str:
    """Changes when the text, the tokenizer or anything in `rest` does."""
    path = Path(name).expanduser()
    facts: list[Any] = [name, sorted(tokenizer.get_vocab().items())[:2000], len(tokenizer), *rest]
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    facts += [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def cached(file: Path, make: Callable[[], Tokens]) -> Tokens:
    """The array in `file`, mapped; made first where it is missing, by one process while others wait."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                save_array(file, make())
    found: Tokens = np.load(file, mmap_mode="r")
    return found


def save_array(file: Path, array: Tokens) -> None:
    """Whole or not at all, so that a run that is killed leaves nothing half written."""
    partial = file.with_name(f"{file.stem}.{os.getpid()}.partial.npy")
    np.save(partial, array)
    partial.replace(file)
