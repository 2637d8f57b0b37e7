r"""GSM8K: school problems in words, answered with steps and a number after "####".

Example with `shots=1`:

    Question: A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?
    Answer: It takes 2/2=<<2/2=1>>1 bolt of white fiber
    So the total amount of fabric is 2+1=<<2+1=3>>3 bolts of fabric
    #### 3

    Question: Two hens lay 3 eggs each. How many eggs are there?
    Answer:

and the model is right (`strict`) if it writes "#### 6", or (`flexible`) if 6 is the last number that it writes.

Source: Cobbe et al. 2021 (arXiv:2110.14168); prompt, stop strings, extraction and comparison are those of
lm-evaluation-harness's `gsm8k` (MIT). One deviation: its shots come from the training set, these from the examples
themselves (never the asked one) unless `shots_from` names another file.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.decoding import Continue, answers
from zoo.evals.core.jsonl import read_examples
from zoo.evals.core.records import Record, summarised
from zoo.evals.core.result import Result
from zoo.evals.core.text import bos_ids, encode

VERSION = 1
NEEDS = ("tokenizer", "examples")
FILE = "gsm8k.jsonl"
STOP = ("Question:", "</s>", "<|im_end|>")
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (r",", r"\$", r"(?s).*#### ", r"\.$")


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    examples: str | Path | None = None,
    samples: int | None = 20,
    shots: int = 5,
    shots_from: str | Path | None = None,
    max_new: int = 256,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Result:
    """Exact match of `model`'s answers.

    Args:
        examples: a .jsonl file of objects with `context`, `chain_of_thought` and `answer`, or a directory that holds
            `gsm8k.jsonl`.
        samples: at most this many, from the start of the file (None: all).
        shots: answered problems before the asked one.
        shots_from: a file or directory they are drawn from (default: `examples`, without the asked one).
        max_new: most tokens of an answer.
        seed: seed of the shots.
        batch_tokens: prompt tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `strict` and `flexible`. Binomial standard errors, Wilson intervals. Problems that with their shots and
        answer are longer than the model allows are left out and counted in `skipped`.

    Raises:
        ZooError: no tokenizer, no usable examples, too few for the shots, or none that fits the model.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "gsm8k")
    running.check_positive("gsm8k", samples=samples, max_new=max_new)
    problems = read(examples)
    prompts = _prompts(problems, samples, shots, problems if shots_from is None else read(shots_from), seed)
    bos = bos_ids(tokenizer)
    requests = [Continue(bos + encode(tokenizer, text), max_new, stop=STOP) for text in prompts]
    limit = running.model_limit(model)
    chosen = [i for i, request in enumerate(requests) if limit is None or len(request.ids) + max_new <= limit]
    if not chosen:
        shortest = min(len(request.ids) for request in requests)
        raise ZooError(
            f"task 'gsm8k': with {shots} shots the shortest problem has {shortest} tokens and {max_new} are left for "
            f"the answer, the model has {limit} positions; ask for fewer shots or a smaller max_new"
        )
    found = answers(model, tokenizer, [requests[i] for i in chosen], batch_tokens=batch_tokens, label="gsm8k")
    records = [
        Record(
            id=str(i),
            scores=scores(text, problems[i]["answer"]),
            prompt=prompts[i],
            output=text,
            answers=(problems[i]["answer"],),
            tokens=len(requests[i].ids),
        )
        for i, text in zip(chosen, found, strict=True)
    ]
    options = {"examples": str(examples), "samples": samples, "shots": shots, "max_new": max_new}
    return running.build(
        "gsm8k",
        VERSION,
        model,
        summarised(records),
        started=started,
        options={**options, "shots_from": None if shots_from is None else str(shots_from)},
        seed=seed,
        skipped=len(prompts) - len(chosen),
        comparable_to="lm_eval:gsm8k but for which shots" if shots else "lm_eval:gsm8k with 0 shots",
        records=records,
    )


def read(examples: str | Path | None) -> list[dict[str, Any]]:
    """The problems of a file or directory; an unusable one raises `ZooError`."""
    return read_examples(examples, "gsm8k", FILE, ("context", "chain_of_thought", "answer"))


def _prompts(
    problems: Sequence[dict[str, Any]], samples: int | None, shots: int, source: Sequence[dict[str, Any]], seed: int
) -> list[str]:
    if not 0 <= shots < len(source):
        raise ZooError(
            f"task 'gsm8k': shots was {shots}; it must be from 0 to {len(source) - 1}, one less than there are"
        )
    return [prompt(problem, i, shots, source, seed) for i, problem in enumerate(problems[:samples])]


def prompt(problem: dict[str, Any], sample: int, shots: int, source: Sequence[dict[str, Any]], seed: int) -> str:
    """The text that the model continues: `shots` problems of `source` with their answers, and the asked one."""
    rng = random.Random(f"gsm8k/{shots}/{sample}/{seed}")
    drawn = [other for other in rng.sample(source, shots + 1) if other["context"] != problem["context"]]
    return "\n\n".join([*map(_answered, drawn[:shots]), _asked(problem)])


def _asked(problem: dict[str, Any]) -> str:
    return f"Question: {problem['context']}\nAnswer:"


def _answered(problem: dict[str, Any]) -> str:
    return f"{_asked(problem)} {problem['chain_of_thought']}\n#### {problem['answer']}"


def scores(text: str, answer: str) -> dict[str, bool]:
    """Whether the number after "####", and the last number of all, is the answer."""
    strict = _STRICT.findall(text)
    flexible = ["".join(groups) for groups in _FLEXIBLE.findall(text)]
    return {
        "strict": bool(strict) and _plain(strict[0]) == _plain(answer),
        "flexible": bool(flexible) and _plain(flexible[-1]) == _plain(answer),
    }


def _plain(number: str) -> str:
    for ignored in _IGNORED:
        number = re.sub(ignored, "", number)
    return number.strip().lower()
