"""The probe for retrieval heads: which heads of softmax attention carry recall from far back.

A head is *local* when it sees the last `window` tokens and the first one alone, as it is in a layer without full
attention. With N(S) the nats per answer token of a model in which the heads S, and no others, see everything, a head's
score is the mean of what it brings to the model of local heads alone and of what is lost with it from the whole:

    score(h) = ((N({}) - N({h})) + (N(all - {h}) - N(all))) / 2 / (N({}) - N(all))

which are its first and last marginal contribution, two terms of a Shapley value. Ablation alone, as in retrieval-aware
distillation (arXiv 2602.11374), misses two heads of which either suffices; and a head that is zeroed also loses what a
layer without full attention keeps.

B batch, T tokens, H heads, V value width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.conversion.core.judge import Judge, attending
from zoo.conversion.core.scored import Scored
from zoo.errors import ZooError

Head = tuple[int, int]  # layer, head
LEAST = 0.05  # nats: below this, local heads recall as well as all do, and nothing can be told


@contextmanager
def local_heads(model: Any, heads: Mapping[int, Collection[int]], window: int) -> Iterator[None]:
    """`model` with the given heads of each layer (softmax attention) limited to `window` tokens and the first one."""
    mixers = {layer: model.model.layers[layer].mixer for layer in heads}
    with attending({mixer: _attend(mixer, heads[layer], window) for layer, mixer in mixers.items()}):
        yield


def _attend(mixer: Any, heads: Collection[int], window: int) -> Any:
    whole, args, attend = len(heads) == mixer.heads, mixer.args, mixer.attend
    near = replace(args, window=min(window, args.window or window), sinks=1)

    def limited(q: Tensor, keys: Any, ctx: Any) -> Tensor:
        mixer.args = near
        try:
            o: Tensor = attend(q, keys, ctx)
        finally:
            mixer.args = args
        if whole:
            return o
        chosen = torch.zeros(mixer.heads, dtype=torch.bool, device=o.device)
        chosen[list(heads)] = True
        return torch.where(chosen[:, None], o, attend(q, keys, ctx))

    return limited


def probe_heads(
    model: Any, judge: Judge, layers: Collection[int], window: int, scored: Scored
) -> dict[Head, dict[str, float]]:
    """By head: `score`, and the nats per answer token with it `alone` seeing far and with all but it (`without`).

    Raises:
        ZooError: the model recalls nothing from beyond the window, so that no head can be told from another.
    """
    every = {layer: range(model.model.layers[layer].mixer.heads) for layer in layers}

    def nats(name: str, local: Mapping[int, Collection[int]]) -> float:
        def measure() -> dict[str, float]:
            with local_heads(model, local, window):
                return judge(model)

        return scored.get(name, measure)["recall_nll"]

    full, none = nats("heads/all", {}), nats("heads/none", every)
    if none - full < LEAST:
        raise ZooError(
            f"the head probe found {full:.3f} nats per answer token with all heads and {none:.3f} with none beyond "
            f"{window} tokens: the teacher recalls nothing of the lists; give more or fewer --pairs, or leave heads out"
        )
    found = {}
    for layer, heads in every.items():
        for head in heads:
            others = {**every, layer: [other for other in heads if other != head]}
            alone, without = (
                nats(f"heads/alone/{layer}/{head}", others),
                nats(f"heads/without/{layer}/{head}", {layer: [head]}),
            )
            score = (none - alone + without - full) / 2 / (none - full)
            found[layer, head] = {"score": score, "alone": alone, "without": without}
    return found
