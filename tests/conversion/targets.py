"""The mixers that attention can become, and what must hold of each: it can learn, from the first step on."""

from __future__ import annotations

from pathlib import Path

import torch

import zoo
from zoo import registry
from zoo.architectures.core.mixer import Mixer
from zoo.conversion.core.align import Align

OWN = {name: vars(registry.get("mixers", name, "MODULE")).get("from_attention") for name in registry.names("mixers")}
# what turns attention into another mixer: every mixer that says how
MIXERS = [name for name, how in OWN.items() if how not in (None, vars(Mixer)["from_attention"]) and name != "attention"]
# those of them that take any softmax over, whatever it sees and however it is capped
RECURRENT = [name for name in MIXERS if not registry.get("mixers", name, "MODULE").keeps_softmax]
EXACT = 1e-10  # of softmax over a choice of keys, of which a short text has all, nothing is to be learned


def assert_learns(source: Path, out: Path, new: set[str], layers: list[int]) -> None:
    """One step down the align loss lowers it, and in `layers` every parameter has a gradient, every `new` one too.

    `out` is what `source` was converted to; it learns from the teacher's own inputs and outputs.
    """
    student, teacher = zoo.from_pretrained(out), zoo.from_pretrained(source)
    align = Align(student, teacher, layers)
    ids = torch.arange(2 * 40).remainder(student.config.vocab_size).view(2, 40)
    weights = {name: p for name, p in student.named_parameters() if name.startswith(mixers(layers))}
    assert new <= weights.keys() | dict(student.named_buffers()).keys()
    before = align(ids)
    if before.item() < EXACT:
        return
    before.backward()
    dead = [name for name in weights if weights[name].grad is None or not weights[name].grad.any()]
    assert not dead, dead
    size = sum(weight.grad.square().sum() for weight in weights.values()) ** 0.5
    with torch.no_grad():
        for weight in weights.values():
            weight -= 1e-3 * weight.grad / size
        after = align(ids)
    assert after < before, (before, after)


def mixers(layers: list[int]) -> tuple[str, ...]:
    """How the names of the parameters of these layers' mixers begin."""
    return tuple(f"model.layers.{layer}.mixer." for layer in layers)
