"""Falcon-H1: transformers' logits, for three configs with every multiplier away from 1, and their layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

CONFIGS: dict[str, dict[str, Any]] = {
    "gate_alone": dict(
        model_type="falcon_h1",
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_d_ssm=48,
        mamba_n_heads=6,
        mamba_d_state=12,
        mamba_n_groups=2,
        mamba_chunk_size=16,
        embedding_multiplier=5.656854249492381,
        lm_head_multiplier=0.3,
        attention_in_multiplier=0.9,
        attention_out_multiplier=0.9375,
        key_multiplier=0.39062499999999994,
        ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.6,
        ssm_multipliers=[0.35, 1.25, 0.7, 1.5, 0.8],
        mlp_multipliers=[0.88, 0.58],
        rope_parameters={"rope_type": "default", "rope_theta": 100000000000.0},
        max_position_embeddings=512,
    ),
    "norm_first": dict(
        model_type="falcon_h1",
        vocab_size=97,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        mamba_d_ssm=None,
        mamba_n_heads=4,
        mamba_expand=3,
        mamba_d_state=7,
        mamba_n_groups=2,
        mamba_d_conv=3,
        mamba_conv_bias=False,
        mamba_proj_bias=True,
        mamba_rms_norm=True,
        mamba_norm_before_gate=True,
        mamba_chunk_size=32,
        attention_bias=True,
        mlp_bias=True,
        time_step_limit=[0.05, 0.9],
        tie_word_embeddings=True,
        key_multiplier=0.7,
        rms_norm_eps=1e-4,
    ),
    "norm_last": dict(
        model_type="falcon_h1",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_n_groups=4,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        mamba_chunk_size=32,
        projectors_bias=True,
        ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_falcon_h1(name: str, tmp_path: Path) -> None:
    model = assert_published(CONFIGS[name], tmp_path)
    for layer in model.config.decoder_config.layers:
        assert (layer.mixer, layer.channel) == ("parallel", "scaled_swiglu")
        assert (layer.mixer_args["first"], layer.mixer_args["second"]) == ("attention", "mamba2")
