"""Bamba: transformers' logits, for two configs, and the layouts that they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published
from transformers import AutoConfig

from zoo.architectures import bamba

CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": dict(
        model_type="bamba",
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_state=12,
        mamba_n_groups=2,
        mamba_chunk_size=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    "biased": dict(
        model_type="bamba",
        vocab_size=97,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=16,
        attn_layer_indices=[0, 3],
        mamba_n_heads=10,
        mamba_d_head=12,
        mamba_expand=3,
        mamba_d_state=7,
        mamba_d_conv=3,
        mamba_conv_bias=False,
        mamba_proj_bias=True,
        mamba_chunk_size=32,
        attention_bias=True,
        mlp_bias=True,
        time_step_limit=[0.05, 0.9],
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.75},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bamba(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = assert_published(config, tmp_path)
    decoder = model.config.decoder_config
    attention = [i for i, layer in enumerate(decoder.layers) if layer.mixer == "attention"]
    assert attention == config["attn_layer_indices"]
    assert all(layer.mixer == "mamba2" for i, layer in enumerate(decoder.layers) if i not in attention)
    assert decoder.ropes["default"].dim == {"grouped": 4, "biased": 12}[name]
    assert decoder.head.tied == (name == "grouped")


def test_half_of_a_head_is_rotated_where_the_config_names_no_share() -> None:
    """As transformers reads it: the factor beside `rope_parameters` is a half whatever the file says."""
    older = {**CONFIGS["grouped"], "partial_rotary_factor": 1.0, "rope_theta": 77.0}
    table = bamba.decoder(older).ropes["default"]
    theirs = AutoConfig.for_model(**older).rope_parameters
    assert (table.dim, table.theta) == (4, 77.0)
    assert (theirs["partial_rotary_factor"], theirs["rope_theta"]) == (0.5, 77.0)
