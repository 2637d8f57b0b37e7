"""Pools of recall rows, made on all cores: `python -m zoo.conversion.core.recall_pool JOB.json` is one worker.

Workers are processes of their own and not forks: a fork of a process that holds a GPU or threads may hang.
N rows, L tokens per row.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from zoo.conversion.core import recall

Array = NDArray[np.int32]
# share of rows that tile one span, which helps recall to appear; share of lists among the documents of the others; do
# lists ask for every entry
KINDS = {"recall": (0.25, 0.6, False), "lists": (0.0, 1.0, True)}
SMALL = 256  # rows that one process makes sooner than others start


class PlainTokenizer:
    """What `recall` needs of a tokenizer, without transformers, which takes seconds to import."""

    def __init__(self, file: Path, eos_token_id: int) -> None:
        self.backend_tokenizer, self.eos_token_id = Tokenizer.from_file(str(file)), eos_token_id

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())


def make_rows(tokenizer: Any, filler: str, count: int, length: int, seed: int, kind: str = "recall") -> Array:
    """Rows [N, L] of recall documents with `filler` between them; `kind` is one of `KINDS`."""
    share, lists, every = KINDS[kind]
    rng, repeats = random.Random(seed), round(count * share)
    text = recall.encode(tokenizer, [filler])[0]
    rows = list(islice(recall.recall_rows(filler, tokenizer, length, seed, lists, every), count - repeats))
    rows += [recall.repeat_row(rng, text, len(tokenizer), length) for _ in range(repeats)]
    rng.shuffle(rows)
    return np.stack(rows) if rows else np.empty((0, length), np.int32)


def recall_pool(
    tokenizer: Any,
    filler: str,
    count: int,
    length: int,
    seed: int,
    workers: int | None = None,
    kind: str = "recall",
) -> Array:
    """As `make_rows`, spread over `workers` processes (all cores by default), each with its own stretch of filler.

    A job's rows depend on its number alone and the number of jobs on `count`, so the pool is the same on any machine.
    """
    jobs = min(16, -(-count // SMALL))  # not the number of cores: the same rows everywhere
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if jobs <= 1 or backend is None:
        return make_rows(tokenizer, filler, count, length, seed, kind)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backend.save(str(folder / "tokenizer.json"))
        sizes = [count // jobs + (n < count % jobs) for n in range(jobs)]
        for n, size in enumerate(sizes):
            start = n * len(filler) // jobs
            (folder / f"{n}.txt").write_text(
                filler[start : start + max(len(filler) // jobs, 200_000)], encoding="utf-8"
            )
            job = {"end": tokenizer.eos_token_id, "count": size, "length": length, "seed": seed * 1000 + n}
            job["kind"] = kind
            (folder / f"{n}.json").write_text(json.dumps(job))
        run_workers(folder, jobs, workers or os.cpu_count() or 1)
        return np.concatenate([np.load(folder / f"{n}.npy") for n in range(jobs)])


def run_workers(folder: Path, jobs: int, workers: int) -> None:
    """Run the jobs `0.json`, `1.json`, ... in `folder`, `workers` at a time."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    waiting, running = list(range(jobs)), list[subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                command = [sys.executable, "-m", __name__, str(folder / f"{waiting.pop(0)}.json")]
                running.append(subprocess.Popen(command, env=environment))
            first = running.pop(0)
            if first.wait():
                raise RuntimeError(f"a worker that makes recall rows ended with code {first.returncode}")
    finally:
        for process in running:
            process.kill()


def main(file: Path) -> None:
    job = json.loads(file.read_text())
    tokenizer = PlainTokenizer(file.with_name("tokenizer.json"), job["end"])
    filler = file.with_suffix(".txt").read_text(encoding="utf-8")
    rows = make_rows(tokenizer, filler, job["count"], job["length"], job["seed"], job["kind"])
    np.save(file.with_suffix(".npy"), rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
