"""LAMBADA: the last word of a passage that is only clear from all of it.

Example: after "She'd forced those words through her teeth. [...] I can make it there on my own," the model must find
" Shane". It is right (`acc`) if each token of the word is the likeliest; `perplexity` is exp of the mean over passages
of -ln P(word), the word as a whole.

Source: Paperno et al. 2016 (arXiv:1606.06031), in the form of lm-evaluation-harness's `lambada_openai` (MIT).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.evals.core import running
from zoo.evals.core.choices import fitting, likelihood_requests
from zoo.evals.core.jsonl import read_examples
from zoo.evals.core.records import Record
from zoo.evals.core.requests import LogLikelihood, outputs
from zoo.evals.core.result import Result, Row
from zoo.evals.core.statistics import exponential, mean_row, proportion

VERSION = 1
NEEDS = ("tokenizer", "examples")
FILE = "lambada_openai.jsonl"


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    examples: str | Path | None = None,
    samples: int | None = 200,
    batch_tokens: int | None = None,
) -> Result:
    """Accuracy and perplexity of `model` on the last words.

    Args:
        examples: a .jsonl file of objects with `context` and `continuation`, or a directory that holds
            `lambada_openai.jsonl`.
        samples: at most this many, from the start of the file (None: all).
        batch_tokens: tokens that run together; it changes the speed, not the scores.

    Returns:
        Rows `acc` (Wilson interval) and `perplexity` (per word; normal interval of its logarithm). Examples longer than
        the model allows are left out and counted in `skipped`.

    Raises:
        ZooError: no tokenizer, no usable examples, or none that fits the model.
    """
    started = time.perf_counter()
    running.require_tokenizer(tokenizer, "lambada")
    running.check_positive("lambada", samples=samples)
    texts = read(examples)[:samples]
    pairs = [(text["context"], f" {text['continuation']}") for text in texts]
    requests = likelihood_requests(tokenizer, pairs, "lambada")
    chosen = fitting(model, [[request] for request in requests], "lambada")
    found = outputs(model, [requests[i] for i in chosen], batch_tokens=batch_tokens, label="lambada")
    records = [_record(i, texts[i], requests[i], output) for i, output in zip(chosen, found, strict=True)]
    return running.build(
        "lambada",
        VERSION,
        model,
        summary(records),
        started=started,
        options={"examples": str(examples), "samples": samples},
        skipped=len(texts) - len(chosen),
        comparable_to="lm_eval:lambada_openai",
        records=records,
    )


def read(examples: str | Path | None) -> list[dict[str, Any]]:
    """The examples of a file or directory; an unusable one raises `ZooError`."""
    return read_examples(examples, "lambada", FILE, ("context", "continuation"))


def summary(records: Sequence[Record]) -> list[Row]:
    """`acc`, and the perplexity of a word."""
    nll = mean_row("nll", [-record.scores["loglikelihood"] for record in records])
    return [proportion("acc", [record.scores["acc"] == 1 for record in records], {}), exponential("perplexity", nll)]


def _record(i: int, text: dict[str, Any], request: LogLikelihood, output: dict[str, Any]) -> Record:
    return Record(
        id=str(i),
        scores={"acc": output["greedy"], "loglikelihood": math.fsum(output["logprobs"])},
        prompt=text["context"],
        output="the likeliest" if output["greedy"] else "not the likeliest",
        answers=(text["continuation"],),
        tokens=len(request.ids),
    )
