"""What each new layer does, measured on text: how near it comes to the attention it replaced, and what its parts do.

B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.watched import main_output, parts, silenced, watched
from zoo.conversion.core import models
from zoo.conversion.core.align import relative_error
from zoo.conversion.core.judge import Judge, Samples, replaced
from zoo.conversion.core.planner import Plan
from zoo.conversion.core.select_heads import local_heads
from zoo.conversion.core.verify import Check

WINDOW = 64
DEAD = 1e-3  # of the KL: a branch that does not raise it by as much does nothing


@torch.no_grad()
def similarity(plan: Plan, teacher: Any, model: Any, ids: Tensor, *, trained: bool) -> Check:
    """By new layer, on the teacher's inputs: cosine and relative error of its output against the attention's, now and,
    after training, as conversion left it."""
    with watched(teacher, list(plan.swaps)) as seen_by_layer:
        teacher.model(input_ids=ids, use_cache=False)
    ages = {"before": models.swapped(plan), "after": model} if trained else {"before": model}
    found: dict[str, dict[str, float]] = {}
    for index in plan.swaps:
        seen, numbers = seen_by_layer[index], {}
        for age, which in ages.items():
            y = main_output(which.model.layers[index].mixer(seen.x, seen.ctx, None))
            numbers[f"cosine_{age}"] = float(F.cosine_similarity(y, seen.y, dim=-1).mean())
            numbers[f"error_{age}"] = float(relative_error(y, seen.y))
        found[str(index)] = numbers
    return {"passed": None, "layers": found}


def branches(plan: Plan, teacher: Any, model: Any, text: Tensor, *, trained: bool) -> Check:
    """KL to the teacher of the model as it is, and with each branch of each new layer switched off in turn.

    `whole` is the layer's output; the mixers inside a mixer are its branches; `window` puts the teacher's attention,
    limited to a window, into the layer's place: a layer that a window can replace remembers nothing beyond it.
    A trained model passes if every branch is of use.

    Args:
        text: ids `[N, L + 1]`.
    """
    judge = Judge(teacher, Samples((), text))
    base = judge(model)
    window = min(WINDOW, text.shape[1] // 4)
    found: dict[str, dict[str, float]] = {}
    for index in plan.swaps:
        mixer = model.model.layers[index].mixer
        off: dict[str, float] = {}
        for name, branch in parts(mixer).items():
            with silenced(branch):
                off[name] = judge(model)["kl"]
        with windowed(teacher, model, index, window):
            off["window"] = judge(model)["kl"]
        found[str(index)] = off
    least = base["kl"] * (1 + DEAD)
    dead = [f"{layer} {name}" for layer, off in found.items() for name, kl in off.items() if kl <= least]
    dead = [name for name in dead if not name.endswith(" window")]
    numbers = {"kl": base["kl"], "perplexity": base["perplexity"], "teacher_perplexity": judge(teacher)["perplexity"]}
    return {"passed": not dead if trained else None, "dead": dead, **numbers, "window": window, "layers": found}


@contextmanager
def windowed(teacher: Any, model: Any, index: int, window: int) -> Iterator[None]:
    """`model` with the teacher's attention in one layer, whose heads see `window` tokens and the first one."""
    mixer = teacher.model.layers[index].mixer
    with ExitStack() as stack:
        stack.enter_context(local_heads(teacher, {index: range(mixer.heads)}, window))
        stack.enter_context(replaced(model, {index: mixer}))
        yield
