"""The llama source is exact: transformers' logits, for every option of its config, and back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import zoo
from zoo.conversion.sources import llama
from zoo.errors import ZooError

LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=1e4)
LONG = dict(
    rope_type="longrope",
    rope_theta=1e4,
    factor=8.0,
    original_max_position_embeddings=32,
    short_factor=[1.0 + 0.1 * i for i in range(8)],
    long_factor=[1.0 + i for i in range(8)],
)
VARIANTS: dict[str, dict[str, Any]] = {
    "hard": {},
    "plain": dict(attention_bias=False, mlp_bias=False, head_dim=8),
    "multi_head": dict(num_key_value_heads=6),
    "multi_query": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "linear": dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1000.0)),
    "llama3": dict(rope_parameters=dict(**LLAMA3, original_max_position_embeddings=32, rope_theta=1e5)),
    "yarn": dict(rope_parameters=YARN),
    "longrope": dict(rope_parameters=LONG),
    "yarn_mscale": dict(rope_parameters=dict(**YARN, mscale=0.7, mscale_all_dim=0.5)),
}


def logits(model: Any, length: int = 100) -> torch.Tensor:
    ids = torch.arange(2 * length).remainder(model.config.vocab_size).view(2, length)
    with torch.no_grad():
        return model(ids).logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.std()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_transformers(make_llama: Any, name: str, attention: str) -> None:
    path = make_llama(**VARIANTS[name])
    theirs = LlamaForCausalLM.from_pretrained(path, attn_implementation=attention)
    assert_close(logits(zoo.from_pretrained(path, attn_implementation=attention)), logits(theirs))


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope"])
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_the_older_spelling_of_ropes_means_the_same(make_llama: Any, kind: str, type_key: str) -> None:
    path = make_llama(**VARIANTS[kind])
    config = json.loads((path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"], scaling[type_key] = scaling.pop("rope_theta"), scaling.pop("rope_type")
    new = llama.decoder(json.loads((path / "config.json").read_text()))
    assert llama.decoder({**config, "rope_scaling": scaling}) == new


def test_the_length_before_stretching_may_stand_outside(make_llama: Any) -> None:
    path = make_llama(rope_parameters=dict(YARN))
    config = json.loads((path / "config.json").read_text()) | {"original_max_position_embeddings": 64}
    (path / "config.json").write_text(json.dumps(config))
    assert_close(logits(zoo.from_pretrained(path)), logits(LlamaForCausalLM.from_pretrained(path)))


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_as_published_transformers_loads_it(make_llama: Any, tmp_path: Path, name: str) -> None:
    path = make_llama(**VARIANTS[name])
    model = zoo.from_pretrained(path)
    zoo.save(model, tmp_path / "back", format="published")
    theirs, info = LlamaForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(logits(model), logits(theirs))
    original = LlamaForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(tensor, original[key]) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(hidden_act="gelu"), "gelu"),
        (dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)), "dynamic"),
        (dict(rope_scaling=dict(type="longrope")), "longrope"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ],
)
def test_what_it_cannot_compute_is_refused_by_name(hard_llama: Path, change: dict[str, Any], word: str) -> None:
    config = json.loads((hard_llama / "config.json").read_text())
    config.pop("rope_parameters") if "rope_scaling" in change else None
    with pytest.raises(ZooError, match=word):
        llama.decoder({**config, **change})


def test_a_second_copy_of_a_tied_embedding_must_equal_it(make_llama: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = make_llama(tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    assert zoo.from_pretrained(path).config.tie_word_embeddings
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ZooError, match=r"lm_head\.weight"):
        zoo.from_pretrained(path)


def test_a_hybrid_cannot_be_published_as_llama(hard_llama: Path, tmp_path: Path) -> None:
    zoo.convert(hard_llama, tmp_path / "out", mixer="gated_delta_net", keep=[1], fresh_process=False)
    model = zoo.from_pretrained(tmp_path / "out")
    with pytest.raises(ZooError, match="hybrid"):
        zoo.save(model, tmp_path / "published", format="published")
    assert not (tmp_path / "published").exists()
