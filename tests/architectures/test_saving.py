"""Saving and loading: transformers' formats, sharing, devices, and a process that knows nothing but the directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from zoo_models import CASES, draw, error, feed, forward, make, same, swiglu_layer

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Head, Rope
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.zoo_config import FORMAT_VERSION, ZooConfig
from zoo.errors import ZooError

READER = """
import sys, torch
import zoo.auto
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
root = Path(sys.argv[1])
ids = torch.load(root / "ids.pt")
with torch.no_grad():
    logits = {p.name: AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in sorted(root.iterdir()) if p.is_dir()}
save_file(logits, root / "logits.safetensors")
"""


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    """Every case in one other process, which takes longer to start than to load them all."""
    torch.save(draw(2, 9), tmp_path / "ids.pt")
    expected = {}
    for number, case in enumerate(CASES):
        model = make(case)
        model.save_pretrained(tmp_path / str(number), max_shard_size="200KB")
        expected[str(number)] = forward(model, draw(2, 9))
    subprocess.run([sys.executable, "-c", READER, str(tmp_path)], check=True)
    found = load_file(tmp_path / "logits.safetensors")
    for number, case in enumerate(CASES):
        assert error(found[str(number)], expected[str(number)])[0] <= 1e-6, case


def test_shards_are_safetensors(preset: str, tmp_path: Path) -> None:
    make(preset).save_pretrained(tmp_path, max_shard_size="100KB")
    names = {path.name for path in tmp_path.iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert {"config.json", "model.safetensors.index.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]


def test_config_survives_json(case: str, tmp_path: Path) -> None:
    config = make(case).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ZooConfig
    assert loaded.decoder_config == config.decoder_config
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == FORMAT_VERSION


def test_auto_classes_load_a_directory(preset: str, tmp_path: Path) -> None:
    model = make(preset)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ZooForCausalLM
    ids = draw(2, 7)
    same(forward(loaded, ids), forward(model, ids), 1e-6)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        same(base(ids).last_hidden_state, model.model(ids).last_hidden_state, 1e-6)
    assert type(AutoModelForCausalLM.from_config(model.config)) is ZooForCausalLM


def test_a_newer_format_is_refused(preset: str, tmp_path: Path) -> None:
    make(preset).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ZooError, match=f"format {FORMAT_VERSION + 1}.*upgrade"):
        AutoConfig.from_pretrained(tmp_path)


def test_push_to_hub_uploads_what_save_pretrained_writes(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, uploaded = make(preset), {}

    def create_commit(self: HfApi, repo_id: str, operations: list[Any], **_: Any) -> None:
        for operation in operations:
            source = operation.path_or_fileobj
            uploaded[operation.path_in_repo] = source if isinstance(source, bytes) else Path(source).read_bytes()

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="someone/tiny"))
    model.push_to_hub("someone/tiny")
    model.save_pretrained(tmp_path)
    expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in uploaded if name != "README.md"} == set(expected)
    assert uploaded["model.safetensors"] == expected["model.safetensors"]
    assert json.loads(uploaded["config.json"]) == json.loads(expected["config.json"])


def shared_config(tied: bool = True) -> ZooConfig:
    args, name = {"intermediate_size": 96}, "attention"
    example = registry.get("mixers", name, "EXAMPLE")
    layers = [swiglu_layer(name, example, share=share) for share in ({"channel": "ffn"}, {}, {"channel": "ffn"})]
    assert layers[0].channel_args == args
    decoder = DecoderConfig(
        vocab_size=97, hidden_size=64, layers=tuple(layers), ropes={"default": Rope(dim=16)}, head=Head(tied=tied)
    )
    return ZooConfig.from_decoder(decoder, "test")


@pytest.mark.parametrize("tied", [True, False], ids=["tied_head", "own_head"])
def test_shared_parts_are_stored_once(tied: bool, tmp_path: Path) -> None:
    model, ids = make(shared_config(tied)), draw(2, 8)
    assert model.model.layers[0].channel is model.model.layers[2].channel
    assert model.model.layers[0].channel is not model.model.layers[1].channel
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.0.channel.up_proj.weight" in names
    assert not [name for name in names if name.startswith("model.layers.2.channel.")]
    assert ("lm_head.weight" in names) != tied
    loaded = ZooForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].channel.up_proj.weight is loaded.model.layers[2].channel.up_proj.weight
    same(forward(loaded, ids), forward(model, ids), 1e-6)
    same(feed(loaded, ids, (5, 1, 2))[0], forward(model, ids))


def test_device_map(preset: str, tmp_path: Path) -> None:
    model, ids = make(preset), draw(2, 8)
    model.save_pretrained(tmp_path / "m")
    expected = forward(model, ids)
    last = model.config.num_hidden_layers - 1
    maps = ["cpu", {"model": "cpu", "lm_head": "cpu"}]
    if not model.config.tie_word_embeddings:
        maps.append({"model": "cpu", "lm_head": "disk"})
    around = (name for name, _ in model.model.named_children() if name != "layers")
    parts = (*around, *(f"layers.{i}" for i in range(last)))
    maps.append({**{f"model.{part}": "cpu" for part in parts}, f"model.layers.{last}": "disk", "lm_head": "cpu"})
    for number, device_map in enumerate(maps):
        folder = tmp_path / f"offload{number}"
        loaded = ZooForCausalLM.from_pretrained(tmp_path / "m", device_map=device_map, offload_folder=folder)
        same(forward(loaded, ids), expected, 1e-6)
        same(feed(loaded, ids, (4, 1, 1, 2))[0], expected)


def test_meta_device(model: ZooForCausalLM) -> None:
    with torch.device("meta"):
        empty = ZooForCausalLM(model.config)
    assert all(p.device.type == "meta" for p in empty.parameters())
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    filled = empty.to_empty(device="cpu")
    for parameter in filled.parameters():
        parameter.data.fill_(float("nan"))
    for _, buffer in filled.named_buffers():
        buffer.data.fill_(float("nan"))
    torch.manual_seed(0)
    for module in filled.modules():
        module._is_hf_initialized = False
    for parameter in filled.parameters():
        parameter._is_hf_initialized = False
    filled.init_weights()
    assert not [name for name, p in filled.named_parameters() if not torch.isfinite(p).all()]
    filled.load_state_dict(model.state_dict())
    same(forward(filled.eval(), draw(2, 6)), forward(model, draw(2, 6)), 1e-6)


def test_dtype_is_that_of_the_config(preset: str, tmp_path: Path) -> None:
    model = make(preset)
    model.bfloat16().save_pretrained(tmp_path)
    assert ZooForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert ZooForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_every_tensor_is_loaded(preset: str, tmp_path: Path) -> None:
    make(preset).save_pretrained(tmp_path)
    info = ZooForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[1]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
