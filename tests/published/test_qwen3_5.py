"""Qwen3.5: transformers' logits for dense models, experts, and the language model of a multimodal checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_near, assert_published, ids_of, logits, make_reference, tolerance
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

import zoo
from zoo.architectures import qwen3_5

DENSE: dict[str, Any] = dict(
    model_type="qwen3_5_text",
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    },
    tie_word_embeddings=True,
)
EXPERTS: dict[str, Any] = dict(
    model_type="qwen3_5_moe_text",
    vocab_size=97,
    hidden_size=40,
    num_hidden_layers=3,
    layer_types=["full_attention", "linear_attention", "full_attention"],
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=20,
    attention_bias=True,
    linear_num_key_heads=3,
    linear_num_value_heads=3,
    linear_key_head_dim=10,
    linear_value_head_dim=14,
    linear_conv_kernel_dim=3,
    num_experts=5,
    num_experts_per_tok=3,
    moe_intermediate_size=20,
    shared_expert_intermediate_size=28,
    rms_norm_eps=1e-5,
    rope_parameters={
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.6,
        "mrope_section": [2, 2, 2],
    },
)


MULTIMODAL = {
    "qwen3_5_text": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3_5_moe_text": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
}


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_qwen3_5(config: dict[str, Any], tmp_path: Path) -> None:
    decoder = assert_published(config, tmp_path, tokens=100).config.decoder_config
    kinds = ["attention" if layer.mixer == "attention" else "linear" for layer in decoder.layers]
    if config is DENSE:
        assert kinds == ["linear"] * 3 + ["attention"] and decoder.head.tied
        assert {layer.channel for layer in decoder.layers} == {"swiglu"} and decoder.ropes["default"].dim == 4
    else:
        assert kinds == ["attention", "linear", "attention"] and not decoder.head.tied
        assert {layer.channel for layer in decoder.layers} == {"moe"} and decoder.ropes["default"].dim == 12
        assert all(layer.channel_args["normalise"] and layer.channel_args["shared_gate"] for layer in decoder.layers)


@pytest.mark.parametrize("text", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_the_language_model_of_a_multimodal_checkpoint(text: dict[str, Any], tmp_path: Path) -> None:
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=4)
    made, cls = MULTIMODAL[text["model_type"]]
    config = made(text_config=text, vision_config=vision, tie_word_embeddings=text is DENSE)
    torch.manual_seed(0)
    reference = cls._from_config(config, attn_implementation="eager").eval()
    reference.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    assert any(name.startswith("model.visual.") for name in tensors)
    assert "model.language_model.layers.1.linear_attn.in_proj_qkv.weight" in tensors
    tensors |= {"mtp.norm.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    ids = ids_of(reference, 60)
    expected = logits(reference, ids)
    bound = tolerance(reference, ids, expected)
    ours = zoo.from_pretrained(tmp_path / "theirs", attn_implementation="eager")
    assert_near(logits(ours, ids), expected, bound, "the language model")
    zoo.save(ours, tmp_path / "back", format="published")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == text["model_type"]
    again = zoo.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert_near(logits(again, ids), expected, bound, "saved by itself")


def test_experts_in_one_tensor_are_read(tmp_path: Path) -> None:
    reference = make_reference(EXPERTS)
    reference.save_pretrained(tmp_path)
    tensors = {name: x for name, x in load_file(tmp_path / "model.safetensors").items() if ".experts." not in name}
    tensors |= {name: x.clone() for name, x in reference.state_dict().items() if ".experts." in name}
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = ids_of(reference, 40)
    assert_near(logits(zoo.from_pretrained(tmp_path), ids), logits(reference, ids), 1e-4, "stacked experts")


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "gelu"), ("attn_output_gate", False)])
def test_what_we_do_not_compute_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(zoo.ZooError, match=field):
        qwen3_5.decoder({**DENSE, field: value})
