"""What `pretrain.py` reads: books as one stream of tokens, and a pool of recall rows made on all cores."""

from __future__ import annotations

import argparse
import lzma
import math
import multiprocessing
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from zoo.conversion.core import recall

Array = np.ndarray[Any, Any]
END, PAD = "<|endoftext|>", "<|pad|>"  # ids 0 and 1


# ---- text, tokenizer, tokens ----------------------------------------------------------------------------------------
def read_books(path: Path, keep: float, seed: int) -> list[str]:
    """The documents of a text file (`.xz` or plain), shuffled, cut after the fraction `keep` of all characters."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
        books = [book.strip() for book in file.read().split(END) if book.strip()]
    random.Random(seed).shuffle(books)
    room, kept = keep * sum(map(len, books)), []
    for book in books:
        kept.append(book)
        room -= len(book)
        if room <= 0:
            break
    return kept


def pieces(book: str, size: int = 32768) -> Iterator[str]:
    """Cuts before a blank line, where tokenising the parts gives the tokens of the whole."""
    start = 0
    while start < len(book):
        stop = book.find("\n\n", start + size)
        stop = len(book) if stop < 0 else stop
        yield book[start:stop]
        start = stop


def train_tokenizer(books: list[str], vocab: int, sample: int = 24_000_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every digit its own token, trained on `sample` characters spread over the books."""
    parts = [piece for book in books for piece in pieces(book)]
    step = max(1, sum(map(len, parts)) // sample)
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(parts[::step], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, padding_side="left"
    )


def tokenize(books: list[str], tokenizer: PreTrainedTokenizerFast, batch: int = 256) -> Array:
    """All books as one uint16 stream, each preceded by id 0. encode_batch uses every core."""
    parts = [(piece, i == 0) for book in books for i, piece in enumerate(pieces(book))]
    stream: list[Array] = []
    for start in range(0, len(parts), batch):
        chunk = parts[start : start + batch]
        encoded = tokenizer.backend_tokenizer.encode_batch_fast([text for text, _ in chunk], add_special_tokens=False)
        for (_, first), encoding in zip(chunk, encoded, strict=True):
            stream.append(np.array([0] * first + encoding.ids, dtype=np.uint16))
    return np.concatenate(stream)


def prepare(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Array]:
    """Tokenizer and tokens from CACHE, made from --text when they are missing; `tokens.bin.xz` is read too."""
    cache = Path(args.cache)
    if not (cache / "tokenizer.json").exists() or not any(cache.glob("tokens.bin*")):
        if not args.text:
            raise SystemExit(f"{cache} holds no tokenizer.json and tokens.bin: give --text")
        cache.mkdir(parents=True, exist_ok=True)
        books = read_books(Path(args.text), args.keep, args.seed)
        tokenizer = train_tokenizer(books, args.vocab)
        tokenizer.save_pretrained(cache)
        tokenize(books, tokenizer).tofile(cache / "tokens.bin")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(cache)
    if (cache / "tokens.bin").exists():
        return tokenizer, np.fromfile(cache / "tokens.bin", dtype=np.uint16)
    return tokenizer, np.frombuffer(lzma.decompress((cache / "tokens.bin.xz").read_bytes()), dtype=np.uint16)


# ---- rows -----------------------------------------------------------------------------------------------------------
def pool_part(job: tuple[PreTrainedTokenizerFast, Array, int, int, int]) -> tuple[Array, Array]:
    """n recall rows and n // 8 rows of repeated spans, with one slice of the books as their filler."""
    tokenizer, text, n, length, seed = job
    rows = recall.recall_rows(tokenizer.decode(text.tolist()), tokenizer, length, seed)
    rng = random.Random(seed)
    repeats = [recall.repeat_row(rng, text, len(tokenizer), length) for _ in range(max(1, n // 8))]
    return np.stack([next(rows) for _ in range(n)]).astype(np.uint16), np.stack(repeats).astype(np.uint16)


def recall_pool(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, books: Array) -> tuple[Array, Array]:
    """--pool million tokens of recall rows [N, L + 1] and an eighth of repeat rows, on all cores."""
    jobs_n, rng = 4 * args.workers, random.Random(args.seed)
    n, size = math.ceil(args.pool * 1e6 / (args.length + 1) / jobs_n), min(150_000, len(books) // 2)
    starts = [rng.randrange(len(books) - size) for _ in range(jobs_n)]
    jobs = [(tokenizer, books[s : s + size], n, args.length + 1, args.seed + i) for i, s in enumerate(starts)]
    if args.workers == 1:
        parts = [pool_part(job) for job in jobs]
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
        with multiprocessing.get_context("fork").Pool(args.workers) as pool:
            parts = pool.map(pool_part, jobs, chunksize=1)
    return np.concatenate([a for a, _ in parts]), np.concatenate([b for _, b in parts])
