"""RWKV: transformers' logits for version 4, and the golden logits of rwkv.cpp's test models for versions 4 to 7."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_published, ids_of, left_padded, logits, make_reference, step_by_step
from safetensors.torch import load_file

import zoo
from zoo.architectures import eagle, rwkv4
from zoo.architectures.core.formats import owner
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.errors import ZooError

SIZES: dict[str, Any] = dict(model_type="rwkv", vocab_size=101, hidden_size=32, num_hidden_layers=3, rescale_every=0)
CONFIGS: dict[str, dict[str, Any]] = {
    "usual": {**SIZES, "attention_hidden_size": 32},
    "odd": {
        **SIZES,
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "attention_hidden_size": 52,
        "intermediate_size": 50,
        "context_length": 77,
        "tie_word_embeddings": True,
    },
}
GOLDEN = {"4v0-660K": "rwkv4", "5v2-730K": "eagle", "6v0-1m": "finch", "7v0-834K": "goose"}
TINY = {"rwkv4": "rwkv4_cpp", "eagle": "eagle", "finch": "finch", "goose": "goose"}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_transformers(name: str, tmp_path: Path) -> None:
    model = assert_published(CONFIGS[name], tmp_path)
    decoder = model.config.decoder_config
    assert model.config.architecture == "rwkv4"
    assert decoder.embed.norm and decoder.norm.kind == "layer"
    assert [layer.mixer_args["layer_index"] for layer in decoder.layers] == list(range(len(decoder.layers)))


def test_layers_that_transformers_rescales_compute_the_same(tmp_path: Path) -> None:
    reference = make_reference({**CONFIGS["usual"], "num_hidden_layers": 4, "rescale_every": 2})
    ids = ids_of(reference)
    reference.save_pretrained(tmp_path / "theirs")  # before the first forward, which changes the weights
    expected = logits(reference, ids)
    found = logits(zoo.from_pretrained(tmp_path / "theirs"), ids)
    # half the stream at the same eps: the norms differ in the fourth digit of their smallest rows
    assert (found - expected).abs().max() < 1e-3 * expected.std()


def test_another_eps_is_refused() -> None:
    with pytest.raises(ZooError, match="layer_norm_epsilon"):
        rwkv4.decoder({**CONFIGS["usual"], "layer_norm_epsilon": 1e-3})


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_logits(name: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "checkpoints" / f"tiny-rwkv-{name}"
    model, golden = zoo.from_pretrained(folder), load_file(folder / "golden.safetensors")
    assert model.config.architecture == GOLDEN[name]
    ids, expected = golden["prompt_ids"][None], golden["reference_logits_all"][None]
    for found in (logits(model, ids), step_by_step(model, ids, 1), left_padded(model, ids)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model, ids)[0, -1], golden["expected_logits_last"], rtol=0, atol=1e-5)
    assert_goes_back(model, folder, tmp_path / "back")


@pytest.mark.shared
def test_one_model_in_two_layouts(shared: Path, tmp_path: Path) -> None:
    folder = shared / "checkpoints/tiny-rwkv-4v0-660K"
    first, second = zoo.from_pretrained(folder), zoo.from_pretrained(folder.with_name(folder.name + "-hf"))
    ids = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(first, ids), logits(second, ids), rtol=0, atol=1e-5)
    assert_goes_back(second, folder.with_name(folder.name + "-hf"), tmp_path / "back")


@pytest.mark.parametrize("name", TINY)
def test_a_random_model_goes_through_the_layout_of_rwkv_cpp(name: str, tmp_path: Path) -> None:
    module = zoo.registry.load("architectures", name)
    torch.manual_seed(0)
    model = ZooForCausalLM(ZooConfig.from_decoder(module.layout(**module.PRESETS["tiny"]), name))
    zoo.save(model, tmp_path / "out", format=TINY[name])
    again = zoo.from_pretrained(tmp_path / "out")
    assert again.config.decoder_config == model.config.decoder_config
    ids = ids_of(model, 20)
    torch.testing.assert_close(logits(again, ids), logits(model.eval(), ids), rtol=1e-5, atol=1e-6)


def test_versions_that_we_do_not_compute_are_refused() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_layers": 1}
    with pytest.raises(ZooError, match="rwkv_version 5.1"):
        eagle.decoder({"rwkv_version": 5.1, **sizes})
    with pytest.raises(ZooError, match="is not supported"):
        owner({"rwkv_version": 3, **sizes})


def assert_goes_back(model: Any, folder: Path, out: Path) -> None:
    """Saved as published, every tensor is the original one (decays go through logarithms)."""
    zoo.save(model, out, format="published")
    expected, found = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6 if "time_decay" in name else 0, atol=0)
