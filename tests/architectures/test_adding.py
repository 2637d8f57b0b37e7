"""A mixer is one file: the one that CONTRIBUTING shows works everywhere, with nothing else touched."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from zoo_models import draw, feed, forward, same, static_cache, stir

import zoo
from zoo import registry
from zoo.errors import ZooError

NAME = "leaky_average"


@pytest.fixture
def added(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file, in a folder of the registry."""
    shown = re.search(r"```python\n(.*?)```", (root / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    assert shown is not None
    (tmp_path / f"{NAME}.py").write_text(shown[1])
    package = importlib.import_module("zoo.architectures.mixers")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    registry._modules.cache_clear()
    yield
    registry._modules.cache_clear()


@pytest.mark.usefixtures("added")
def test_the_mixer_of_contributing_works_in_a_layout(tmp_path: Path) -> None:
    assert NAME in zoo.list("mixers")
    model = zoo.create("hybrid", layout=f"{NAME}*2,attention(window=4),{NAME}(start=1.0)")
    stir(model)
    ids = draw(2, 13)
    whole = forward(model, ids)
    same(feed(model, ids, (5, 1, 1, 6))[0], whole)
    same(feed(model, ids, (6, 1, 6), cache=static_cache(model, 20))[0], whole)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    same(forward(model, ids, attention_mask=mask)[:1, 5:], forward(model, ids[:1, 5:]))
    bounds = torch.tensor([0, 5, 13], dtype=torch.int32)
    same(forward(model, ids[:1], cu_seqlens=bounds)[:, 5:], forward(model, ids[:1, 5:]))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 16)
    zoo.save(model, tmp_path / "out")
    same(forward(zoo.from_pretrained(tmp_path / "out"), ids), whole, 1e-6)
    _, cache = feed(model, ids, (12, 1))
    held = sum(sum(layer.bytes().values()) for layer in cache.layers)
    assert held == 2 * model.state_bytes(13)


@pytest.mark.usefixtures("added")
def test_its_bad_arguments_are_refused_before_weights_are_made() -> None:
    with pytest.raises(ZooError, match="start was 99"):
        zoo.create("hybrid", layout=f"{NAME}(start=99)")
    with pytest.raises(ZooError, match="unknown argument 'heads'"):
        zoo.create("hybrid", layout=f"{NAME}(heads=2)")
