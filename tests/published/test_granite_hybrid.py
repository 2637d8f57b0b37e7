"""Granite 4.0 H: transformers' logits, dense and with experts, with and without RoPE, and the layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

CONFIGS: dict[str, dict[str, Any]] = {
    "dense": dict(
        model_type="granitemoehybrid",
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        shared_intermediate_size=56,
        num_local_experts=0,
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_n_heads=4,
        mamba_d_state=12,
        mamba_n_groups=2,
        mamba_chunk_size=16,
        embedding_multiplier=12,
        residual_multiplier=0.22,
        attention_multiplier=0.3,
        logits_scaling=6,
        tie_word_embeddings=True,
        position_embedding_type="nope",
    ),
    "experts": dict(
        model_type="granitemoehybrid",
        vocab_size=97,
        hidden_size=40,
        intermediate_size=24,
        shared_intermediate_size=36,
        num_local_experts=5,
        num_experts_per_tok=3,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "full_attention"],
        num_attention_heads=5,
        num_key_value_heads=1,
        mamba_n_heads=10,
        mamba_expand=3,
        mamba_d_state=7,
        mamba_d_conv=3,
        mamba_conv_bias=False,
        mamba_proj_bias=True,
        mamba_chunk_size=32,
        attention_bias=True,
        attention_multiplier=0.25,
        logits_scaling=3.7,
        position_embedding_type="rope",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        time_step_limit=[0.05, 0.9],
        rms_norm_eps=1e-4,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_granite_hybrid(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = assert_published(config, tmp_path)
    decoder = model.config.decoder_config
    mixers = {"mamba": "mamba2", "linear_attention": "mamba2", "attention": "attention", "full_attention": "attention"}
    assert [layer.mixer for layer in decoder.layers] == [mixers[word] for word in config["layer_types"]]
    assert {layer.channel for layer in decoder.layers} == {"swiglu" if name == "dense" else "moe"}
    assert bool(decoder.ropes) == (config["position_embedding_type"] == "rope")


def test_granite_without_mamba(tmp_path: Path) -> None:
    """The dense models of the family have softmax attention in every layer."""
    config = {**CONFIGS["dense"], "layer_types": ["attention"] * 3, "position_embedding_type": "rope"}
    decoder = assert_published(config, tmp_path, tokens=40).config.decoder_config
    assert {layer.mixer for layer in decoder.layers} == {"attention"}
