"""Checkpoints of tiny random models, and a count of the calls of methods."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import zoo
from zoo.architectures.core.sparse import Method, View

sys.path.insert(0, str(Path(__file__).parent))  # sparse_models, which importlib mode does not find by itself

from sparse_models import FAMILIES, SIZES, dense, padded, stepwise


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Directories of tiny random models, made when asked for: a family, with other values of its config."""
    folder, made = tmp_path_factory.mktemp("foreign"), {}

    def path(family: str, **fields: Any) -> Path:
        name = f"{family}{len(made) if fields else ''}"
        if name not in made:
            own = FAMILIES[family] if family == "gpt2" else {**SIZES, **FAMILIES[family]}
            config = AutoConfig.for_model(family, **{**copy.deepcopy(own), "pad_token_id": 0, **fields})
            config.eos_token_id = config.bos_token_id = None
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                parameter.data.mul_(2.0) if parameter.dim() > 1 else None
            model.save_pretrained(folder / name)
            made[name] = folder / name
        return made[name]

    return path


@pytest.fixture(scope="module")
def llama(checkpoints: Any) -> Any:
    """A model whose attention is replaced again and again."""
    return dense(checkpoints("llama"))


@pytest.fixture(scope="module")
def ours(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in our format."""
    return zoo.save(zoo.from_pretrained(checkpoints("llama")), tmp_path_factory.mktemp("ours") / "llama")


@pytest.fixture(scope="module")
def expected(checkpoints: Any) -> Tensor:
    """What its own attention gives."""
    return stepwise(dense(checkpoints("llama")), padded, DynamicCache())


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often some method answered, by phase."""
    calls: Counter[str] = Counter()
    call = Method.__call__

    def counting(self: Method, view: View) -> Tensor:
        calls["decode" if view.decoding else "prefill"] += 1
        return call(self, view)

    monkeypatch.setattr(Method, "__call__", counting)
    yield calls
