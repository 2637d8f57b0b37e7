"""A model of ours as a language model of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.decoding import Continue, answers
from zoo.evals.core.requests import LogLikelihood, outputs
from zoo.evals.core.text import bos_ids, encode

_WINDOW = 2048  # of rolling likelihoods, for a model without a limit


class ZooLM(TemplateLM):
    """Answers the harness's requests through ours; a text beyond the model's length is refused, never cut.

    Args:
        model, tokenizer: as for every eval.
        task: its name in errors and on the progress bar.
        batch_tokens: tokens that run together.
    """

    def __init__(self, model: Any, tokenizer: Any, task: str, batch_tokens: int | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.task, self.batch_tokens = model, tokenizer, task, batch_tokens
        self.bos = bos_ids(tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self._token("eos_token_id", "bos_token_id")

    @property
    def prefix_token_id(self) -> int:
        return self._token("bos_token_id", "eos_token_id")

    def _token(self, *names: str) -> int:
        for name in names:
            if (found := getattr(self.tokenizer, name, None)) is not None:
                return int(found)
        raise ZooError(f"task {self.task!r} needs a tokenizer with a BOS or EOS token; this one has neither")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        bos = self.bos
        if add_special_tokens is False or (bos and string.startswith(self.tokenizer.bos_token)):
            bos = []
        return bos + encode(self.tokenizer, string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            if not context or not continuation:
                raise ZooError(f"task {self.task!r} has a context or a continuation without tokens of its own")
        asked = [LogLikelihood(context + continuation, len(context)) for _, context, continuation in requests]
        running.check_length(self.model, max(len(request.ids) - 1 for request in asked), self.task)
        found = outputs(self.model, asked, batch_tokens=self.batch_tokens, label=self.task)
        return [(math.fsum(output["logprobs"]), output["greedy"]) for output in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Disjoint windows of the model's length (2048 tokens where it has none), one token of context each."""
        size = running.model_limit(self.model) or _WINDOW
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, size, 1)
            ]
            for (text,) in (request.args for request in requests)
        ]
        found = iter(self._loglikelihood_tokens([(None, *window) for each in windows for window in each]))
        return [math.fsum(next(found)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to the first stop string; sampling is refused."""
        asked = [self._continue(*request.args) for request in requests]
        running.check_length(self.model, max(len(request.ids) + request.max_new for request in asked), self.task)
        return answers(self.model, self.tokenizer, asked, batch_tokens=self.batch_tokens, label=self.task)

    def _continue(self, context: str, options: dict[str, Any]) -> Continue:
        wanted = normalize_gen_kwargs(options)
        if wanted.get("do_sample"):
            raise ZooError(f"task {self.task!r} samples its answers; this back end is greedy: set do_sample to false")
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return Continue(ids, wanted["max_gen_toks"], stop=tuple(wanted["until"]))
