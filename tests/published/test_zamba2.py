"""Zamba2: transformers' logits with one and two shared blocks, adapters, RoPE and biases, and what is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_published
from safetensors.torch import load_file, save_file

import zoo
from zoo.architectures import zamba2
from zoo.errors import ZooError

CONFIGS: dict[str, dict[str, Any]] = {
    "two_blocks": dict(
        model_type="zamba2",
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "hybrid", "hybrid"],
        num_mem_blocks=2,
        use_shared_attention_adapter=True,
        adapter_rank=3,
        use_mem_rope=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        intermediate_size=40,
        num_attention_heads=4,
        n_mamba_heads=4,
        mamba_d_state=12,
        mamba_ngroups=2,
        chunk_size=16,
        time_step_min=0.2,
    ),
    "one_block": dict(
        model_type="zamba2",
        vocab_size=97,
        hidden_size=40,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        num_mem_blocks=1,
        adapter_rank=5,
        intermediate_size=56,
        num_attention_heads=5,
        num_key_value_heads=1,
        n_mamba_heads=10,
        mamba_expand=3,
        mamba_d_state=7,
        mamba_d_conv=3,
        chunk_size=32,
        add_bias_linear=True,
        rms_norm_eps=1e-4,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_zamba2(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = assert_published(config, tmp_path)
    layers = model.model.layers
    hybrid = [i for i, word in enumerate(config["layers_block_type"]) if word == "hybrid"]
    assert [i for i, layer in enumerate(layers) if layer.channel is not None] == hybrid
    first, again = (layers[hybrid[i]].channel for i in (0, config["num_mem_blocks"]))
    assert first.down_proj is again.down_proj and first.attention.q_proj.base is again.attention.q_proj.base
    assert first.gate_up_proj.up is not again.gate_up_proj.up and first.out_proj is not again.out_proj
    if config["num_mem_blocks"] == 2:
        assert layers[hybrid[1]].channel.down_proj is not first.down_proj


def test_a_second_copy_of_shared_weights_must_be_equal(tmp_path: Path) -> None:
    assert_published(CONFIGS["one_block"], tmp_path, tokens=20)
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.{}.shared_transformer.feed_forward.down_proj.weight"
    tensors[name.format(3)] = tensors[name.format(1)].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    zoo.from_pretrained(tmp_path / "theirs")
    tensors[name.format(3)] = torch.zeros_like(tensors[name.format(1)])
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ZooError, match="differs"):
        zoo.from_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize(("field", "value"), [("use_long_context", True), ("tie_word_embeddings", False)])
def test_what_it_does_not_compute_is_refused_by_name(field: str, value: bool) -> None:
    with pytest.raises(ZooError, match=field):
        zamba2.decoder({**CONFIGS["one_block"], field: value})
