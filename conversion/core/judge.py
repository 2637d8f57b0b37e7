"""What a change of a model costs: KL to the unchanged model, perplexity, and recall of what stands in the prompt.

N rows of text, L tokens per row, C scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.conversion.core.distill import chunked_kl
from zoo.conversion.core.recall import Probe

CHUNK = 1024  # tokens whose logits are held at once
Scores = dict[str, float]


@dataclass(frozen=True)
class Samples:
    """What models are measured on.

    Args:
        probes: prompts with the answer that stands earlier in them, if recall is measured.
        text: ids `[N, L + 1]`, if KL and perplexity on text are.
    """

    probes: Sequence[Probe]
    text: Tensor | None = None


@dataclass(frozen=True)
class Seen:
    """Final hidden states `[C, D]` at the scored tokens, and those tokens `[C]`."""

    hidden: Tensor
    targets: Tensor


class Judge:
    """Scores models of the teacher's vocabulary: `judge(model) -> Scores`.

    `kl` and `perplexity` are those of the text, if there is any; `recall_nll` (nats per answer token), `recall_kl` and
    `recall_accuracy` (whole answers, greedy) those of the probes.

    Args:
        teacher: a causal model of ours, as it is now: later calls compare with what it predicts here.
        samples: what to measure on.
        batch_tokens: tokens of a forward.
    """

    def __init__(self, teacher: Any, samples: Samples, batch_tokens: int = 4096) -> None:
        self.samples, self.batch_tokens = samples, batch_tokens
        self.head, self.device = teacher.logits, teacher.device
        self.target = self._run(teacher)

    @torch.no_grad()
    def __call__(self, model: Any) -> Scores:
        found: Scores = {}
        for name, seen in self._run(model).items():
            target = self.target[name].hidden
            kl = float(chunked_kl(seen.hidden, target, model.logits, self.head, CHUNK))
            nll, right = _likelihood(model, seen)
            if name == "text":
                found |= {"kl": kl, "perplexity": math.exp(min(nll, 700.0))}
            else:
                found |= {"recall_nll": nll, "recall_kl": kl, "recall_accuracy": self._whole(right)}
        return found

    @torch.no_grad()
    def _run(self, model: Any) -> dict[str, Seen]:
        seen = {"probes": self._answers(model)} if self.samples.probes else {}
        if self.samples.text is not None:
            rows = self.samples.text.to(self.device)
            parts = rows[:, :-1].split(max(1, self.batch_tokens // rows.shape[1]))
            hidden = torch.cat([_hidden(model, part).flatten(0, 1) for part in parts])
            seen["text"] = Seen(hidden, rows[:, 1:].flatten())
        return seen

    def _answers(self, model: Any) -> Seen:
        """The answers' tokens; prompts are padded on the right, which causal layers cannot see."""
        hidden, targets = [], []
        probes = self.samples.probes
        longest = max(len(probe.ids) for probe in probes)
        step = max(1, self.batch_tokens // longest)
        for start in range(0, len(probes), step):
            batch = probes[start : start + step]
            rows = torch.tensor([[*probe.ids, *[0] * (longest - len(probe.ids))] for probe in batch])
            states = _hidden(model, rows.to(self.device))
            hidden += [x[p.start - 1 : len(p.ids) - 1] for x, p in zip(states, batch, strict=True)]
            targets += [token for p in batch for token in p.ids[p.start :]]
        return Seen(torch.cat(hidden), torch.tensor(targets, device=self.device))

    def _whole(self, right: Tensor) -> float:
        """Share of answers of which every token is right."""
        lengths = [len(probe.ids) - probe.start for probe in self.samples.probes]
        return sum(bool(part.all()) for part in right.split(lengths)) / len(lengths)


def _hidden(model: Any, ids: Tensor) -> Tensor:
    states: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return states


def _likelihood(model: Any, seen: Seen) -> tuple[float, Tensor]:
    """Mean negative log-likelihood in nats, and where the likeliest token is the right one `[C]`."""
    total, right = 0.0, []
    for hidden, targets in zip(seen.hidden.split(CHUNK), seen.targets.split(CHUNK), strict=True):
        logits = model.logits(hidden).float()
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        right.append(logits.argmax(-1) == targets)
    return total / len(seen.targets), torch.cat(right)


@contextmanager
def replaced(model: Any, mixers: dict[int, nn.Module]) -> Iterator[None]:
    """`model` with other mixers in some layers."""
    own = {index: model.model.layers[index].mixer for index in mixers}
    try:
        for index, mixer in mixers.items():
            model.model.layers[index].mixer = mixer
        yield
    finally:
        for index, mixer in own.items():
            model.model.layers[index].mixer = mixer


@contextmanager
def attending(attends: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Softmax mixers that attend by functions in the place of their own `attend`."""
    for mixer, attend in attends.items():
        mixer.attend = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        for mixer in attends:
            del mixer.attend
