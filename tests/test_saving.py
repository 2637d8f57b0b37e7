"""What is made and saved comes back the same: our own format, transformers' own save, the published one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.errors import ZooError


def logits(model: Any, length: int = 40) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(length)[None] % model.config.vocab_size).logits


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_save_and_load_give_the_same_model(size: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = zoo.create("gated_delta_net", preset="hybrid_tiny")
    zoo.save(model, tmp_path / "out", max_shard_size=size)
    again = zoo.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(again))
    assert again.config.decoder_config == model.config.decoder_config
    with pytest.raises(ZooError, match="exists"):
        zoo.save(model, tmp_path / "out")


def test_transformers_own_save_is_read_too(tmp_path: Path) -> None:
    model = zoo.create("transformer")
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(zoo.from_pretrained(tmp_path / "out")), logits(model))


def test_a_masked_model_comes_back_as_one(tmp_path: Path) -> None:
    from zoo.architectures.core.modeling import ZooForMaskedLM

    model = ZooForMaskedLM(zoo.config("transformer")).eval()
    zoo.save(model, tmp_path / "out")
    again = zoo.from_pretrained(tmp_path / "out")
    assert type(again) is ZooForMaskedLM
    assert torch.equal(logits(again), logits(model))
    changed = torch.arange(40)[None]
    changed[0, -1] = 5
    with torch.no_grad():
        assert not torch.equal(again(changed).logits[:, 0], logits(model)[:, 0]), "it looks ahead"


def test_a_created_transformer_can_be_published(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = zoo.create("transformer")
    zoo.save(model, tmp_path / "llama", format="published")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5 * logits(model).std()
    with pytest.raises(ZooError, match="lama"):
        zoo.save(model, tmp_path / "other", format="lama")


def test_create_and_config() -> None:
    config = zoo.config("transformer", preset="tiny", depth=2, rope_theta=123.0)
    assert len(config.layers) == 2 and config.decoder_config.ropes["default"].theta == 123.0
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(zoo.create("transformer", depth=2))
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert not models[0].training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("transfomer",), "did you mean transformer"),
        (("transformer", "huge"), "no preset 'huge'; choose one of tiny"),
    ],
)
def test_unknown_names(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ZooError, match=words):
        zoo.create(*arguments)


def test_an_unknown_override() -> None:
    with pytest.raises(ZooError, match="colour"):
        zoo.config("transformer", colour="red")
