"""Attention becomes every mixer that takes it over: what is new has a gradient, and one step brings the mixer nearer to
the attention that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import MIXERS, run
from test_sources import OPTIONS, REFUSED, Make, make

import zoo
from zoo.conversion.core.align import Align

__all__ = ["make"]  # a fixture
# mixers that need nothing learned: softmax over a choice of keys, of which a short text has all
EXACT = 1e-10


def assert_learns(source: Path, out: Path, new: set[str]) -> None:
    """One step on the align loss lowers it, and every new parameter of the mixers has a gradient.

    `out` is trained on a teacher's inputs and outputs, which are those of `source`.
    """
    student, teacher = zoo.from_pretrained(out), zoo.from_pretrained(source)
    layers = sorted({int(name.split(".")[2]) for name in new}) or [0]
    align = Align(student, teacher, layers)
    ids = torch.arange(2 * 40).remainder(student.config.vocab_size).view(2, 40)
    weights = {name: p for name, p in student.named_parameters() if ".mixer." in name and int(name.split(".")[2]) in layers}
    before = align(ids)
    if before < EXACT:
        return
    before.backward()
    dead = [name for name in new if not weights[name].grad.any()]
    assert not dead, dead
    assert all(torch.isfinite(weight.grad).all() for weight in weights.values())
    with torch.no_grad():
        size = sum(weight.grad.square().sum() for weight in weights.values()).sqrt()
        for weight in weights.values():
            weight -= 1e-3 * weight.grad / size
        after = align(ids)
    assert after < before, (before, after)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_target_learns(mixer: str, hard_llama: Path, tmp_path: Path) -> None:
    report = run(hard_llama, tmp_path / "out", mixer=mixer, keep=[1])
    assert_learns(hard_llama, tmp_path / "out", set(report.plan.new))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", sorted(set(OPTIONS) - set(REFUSED)))
def test_every_source_becomes_every_target(make: Make, tmp_path: Path, name: str, mixer: str) -> None:
    source = make(name)
    report = run(source, tmp_path / "out", mixer=mixer, keep=[1])
    assert report.checks["expansion"]["passed"]
    assert_learns(source, tmp_path / "out", set(report.plan.new))
