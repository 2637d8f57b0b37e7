"""Qwen3-Next: transformers' logits, for configs with and without experts, and the layouts that they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_near, assert_published, ids_of, logits, make_reference
from safetensors.torch import load_file, save_file

import zoo
from zoo.architectures import qwen3_next

CONFIGS: dict[str, dict[str, Any]] = {
    "dense": dict(
        model_type="qwen3_next",
        vocab_size=97,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=3,
        full_attention_interval=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=20,
        attention_bias=True,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=10,
        linear_value_head_dim=14,
        linear_conv_kernel_dim=3,
        num_experts=0,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.6},
        tie_word_embeddings=True,
    ),
    "experts": dict(
        model_type="qwen3_next",
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
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=24,
        norm_topk_prob=False,
        mlp_only_layers=[1],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_qwen3_next(name: str, tmp_path: Path) -> None:
    decoder = assert_published(CONFIGS[name], tmp_path, tokens=100).config.decoder_config
    dense = name == "dense"
    assert [i for i, layer in enumerate(decoder.layers) if layer.mixer == "attention"] == ([1] if dense else [3])
    assert [layer.channel for layer in decoder.layers].count("swiglu") == (3 if dense else 1)
    assert decoder.layers[1].channel == "swiglu"
    assert decoder.ropes["default"].dim == (12 if dense else 4)
    assert decoder.layers[0].mixer_args["value_heads"] == (3 if dense else 6)
    assert decoder.norm.kind == "rms_one_plus"


def test_further_token_heads_are_left_out(tmp_path: Path) -> None:
    reference = make_reference(CONFIGS["dense"])
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "mtp.fc.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    ids = ids_of(reference, 20)
    assert_near(logits(zoo.from_pretrained(tmp_path), ids), logits(reference, ids), 1e-4, "with mtp")
    save_file({**tensors, "model.extra": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(zoo.ZooError, match="model.extra"):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "gelu"), ("layer_types", ["sliding_attention"] * 3)])
def test_what_we_do_not_compute_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(zoo.ZooError, match=field):
        qwen3_next.decoder({**CONFIGS["dense"], field: value})
