"""Scores of layers from a bank of aligned mixers: what one swap costs, and which layers to restore first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.conversion.core.judge import Judge, Scores, replaced
from zoo.conversion.core.scored import Scored
from zoo.errors import ZooError

Mixers = Mapping[int, nn.Module]


def mixers_of(bank: Any, teacher: Any, where: str | Path) -> dict[int, nn.Module]:
    """The mixers of `bank`, a converted model, by layer, where they are not the teacher's own.

    Raises:
        ZooError: not a conversion of this teacher, or one whose other weights were trained too, so that its mixers do
            not fit the teacher.
    """
    ours, theirs = (model.model.decoder_config.layers for model in (bank, teacher))
    found = {
        index: bank.model.layers[index].mixer
        for index, (one, other) in enumerate(zip(ours, theirs, strict=False))
        if (one.mixer, one.mixer_args) != (other.mixer, other.mixer_args)
    }
    if len(ours) != len(theirs) or not found:
        raise ZooError(f"bank {where} is no conversion of the teacher; align one with `zoo heal`, stage align alone")
    swapped = tuple(f"model.layers.{index}.mixer." for index in found)
    expected = {name: x for name, x in teacher.state_dict().items() if not name.startswith(swapped)}
    state = {name: x for name, x in bank.state_dict().items() if not name.startswith(swapped)}
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected or not torch.equal(state[name], expected[name].to(state[name])):
            raise ZooError(
                f"bank {where} differs from the teacher in {name}; a bank has trained mixers and nothing else: "
                "align a conversion of this teacher with `zoo heal`, stage align alone"
            )
    return found


def swap_each(teacher: Any, mixers: Mixers, judge: Judge, scored: Scored) -> dict[int, Scores]:
    """What each layer alone costs when it is swapped (HALO's and KL-guided selection's cheap score)."""

    def swapped(layer: int) -> Scores:
        with replaced(teacher, {layer: mixers[layer]}):
            return judge(teacher)

    return {layer: scored.get(f"swap/{layer}", partial(swapped, layer)) for layer in mixers}


def restore_greedily(
    teacher: Any, mixers: Mixers, judge: Judge, keep: int, scored: Scored
) -> tuple[list[int], dict[int, float]]:
    """From everything swapped, restore the layer whose attention lowers the KL most, `keep` times.

    The KL is that of the text and of the answers together.

    Returns:
        All layers, the restored ones first and in that order, the others by the last step; and by layer the KL that it
        leaves when it is restored first.
    """

    def left(layers: Sequence[int]) -> float:
        def measure() -> Scores:
            with replaced(teacher, {index: mixer for index, mixer in mixers.items() if index not in layers}):
                return judge(teacher)

        found = scored.get(f"restore/{','.join(map(str, sorted(layers)))}", measure)
        return found.get("kl", 0.0) + found["recall_kl"]

    chosen: list[int] = []
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for _ in range(min(keep, len(mixers))):
        last = {layer: left([*chosen, layer]) for layer in mixers if layer not in chosen}
        first = first or last
        chosen.append(min(last, key=lambda layer: last[layer]))
    rest = sorted((layer for layer in mixers if layer not in chosen), key=lambda layer: last[layer])
    return [*chosen, *rest], first
