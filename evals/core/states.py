"""Effective state sizes of the mixers of a model (`zoo.architectures.core.mixing`), and those of the states they keep.

T tokens, H heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.mixer import Mixer
from zoo.architectures.core.mixing import mixing_matrix, state_places, state_sizes_at
from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.layers import Place, inputs, mixers

Sizes = dict[Place, dict[int, Tensor]]


def check_tolerance(task: str, tolerance: float) -> None:
    """Raise `ZooError` unless it is a share."""
    if not 0 < tolerance < 1:
        raise ZooError(f"task {task!r}: tolerance was {tolerance}; it must be between 0 and 1")


def effective(model: Any, rows: Tensor, tolerance: float, task: str) -> tuple[dict[str, Sizes], list[Place]]:
    """By variant, mixer and token: the sizes `[N, H]` over the rows `[N, T]`; and the mixers that have no matrix."""
    every = mixers(model, task)
    found = {place: mixer for place, mixer in every.items() if type(mixer).mix_values is not Mixer.mix_values}
    parts: dict[str, dict[Place, dict[int, list[Tensor]]]] = {
        name: defaultdict(lambda: defaultdict(list)) for name in ("tolerance", "entropy")
    }
    for row in running.track(rows, task, len(rows)):
        for place, mixer, x, ctx in inputs(model, found, row):
            weights = mixing_matrix(mixer, x, ctx)[0]
            for token in state_places(rows.shape[1]):
                for name, sizes in zip(parts, state_sizes_at(weights, token, tolerance), strict=True):
                    parts[name][place][token].append(sizes.cpu())
    whole = {
        name: {place: {t: torch.stack(sizes) for t, sizes in at.items()} for place, at in by.items()}
        for name, by in parts.items()
    }
    return whole, [place for place in every if place not in found]


def theoretical(model: Any, rows: Tensor, places: Mapping[Place, Any]) -> dict[Place, dict[int, int]]:
    """By mixer and token i, the rows of the state that it keeps per head: i keys, a ring's length, or those of its
    largest recurrent state (1 of an elementwise one)."""
    with running.evaluating(model):
        cache = model(input_ids=rows[:1].to(running.device_of(model)), use_cache=True).past_key_values
    found = {}
    for layer, part in places:
        prefix = f"{part.replace('.', '/')}/" if part else ""
        held = [state for name, state in cache.layers[layer].held().items() if name.startswith(prefix)]
        keys = any(kind == "kv" for kind, _ in held)
        ring = max((x.shape[1] for kind, x in held if kind == "ring"), default=0)
        kept = [x.shape[2] if x.dim() > 2 else 1 for kind, x in held if kind == "recurrent"]
        size = max(kept, default=0)
        found[layer, part] = {i: (i if keys else min(i, ring)) + size for i in state_places(rows.shape[1])}
    return found
