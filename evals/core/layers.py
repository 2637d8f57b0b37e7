"""The mixers of a model's layers, and what they read when the model runs on sample text.

B batch, T tokens, N rows.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.mixer import Context, Mixer
from zoo.architectures.core.watched import recorded
from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.text import read_text, windows

Place = tuple[int, str]


def mixers(model: Any, task: str) -> dict[Place, Mixer]:
    """Every mixer that holds no other one, by (layer, its name inside the layer's mixer, "" for that one itself); one
    that several layers share is given with the first.

    Raises:
        ZooError: a model that is not one of the zoo's.
    """
    layers = getattr(getattr(model, "model", None), "layers", ())
    found: dict[Place, Mixer] = {}
    for index, layer in enumerate(layers):
        mixer = getattr(layer, "mixer", None)
        for name, module in () if mixer is None else mixer.named_modules():
            inner = any(isinstance(part, Mixer) for part in module.modules() if part is not module)
            if isinstance(module, Mixer) and not inner and all(module is not seen for seen in found.values()):
                found[index, name] = module
    if not found:
        raise ZooError(f"task {task!r} looks into mixers, and {type(model).__name__} has none; load it with zoo")
    return found


def at(place: Place, **more: int | str) -> dict[str, int | str]:
    """The place as that of a row."""
    layer, part = place
    return {"layer": layer, **({"part": part} if part else {}), **more}


def sample_rows(
    model: Any, tokenizer: Any, data: str | Path | None, length: int, samples: int, seed: int, task: str
) -> tuple[Tensor, int]:
    """`[N, length]` ids from the start of `data`, and how many tokens were left over; random tokens without data.

    Raises:
        ZooError: sizes that are not positive, a length beyond the model's, or unusable data.
    """
    running.check_positive(task, samples=samples)
    running.check_length(model, length, task)
    if data is None:
        size = running.vocab_size(model)
        rngs = [random.Random(f"{task}/{length}/{sample}/{seed}") for sample in range(samples)]
        return torch.tensor([[rng.randrange(size) for _ in range(length)] for rng in rngs]), 0
    running.require_tokenizer(tokenizer, task)
    cuts = windows(read_text(data, task), tokenizer, length, samples)
    return cuts.rows[:, :length], cuts.skipped


def inputs(model: Any, found: dict[Place, Mixer], row: Tensor) -> Iterator[tuple[Place, Any, Tensor, Context]]:
    """Each mixer in at least fp32 with the input `[1, T, D]` and the context that it has when the model reads `row`."""
    with running.evaluating(model):
        with recorded(found) as seen:
            model(input_ids=row[None].to(running.device_of(model)), use_cache=False)
        for place, mixer in found.items():
            each = seen[place]
            if each.x.dtype in (torch.float32, torch.float64):
                yield place, mixer, each.x, each.ctx
            else:  # a half-precision matrix has full rank by its rounding alone
                yield place, copy.deepcopy(mixer).float(), each.x.float(), widened(each.ctx)


def widened(ctx: Context) -> Context:
    """The context with its tables and values in fp32."""

    def wide(x: Tensor) -> Tensor:
        return x.float() if x.is_floating_point() else x

    ropes = {name: (cos.float(), sin.float()) for name, (cos, sin) in ctx.ropes.items()}
    return replace(ctx, ropes=ropes, values={name: wide(value) for name, value in ctx.values.items()})
