"""Jamba as transformers publishes it: its layout, its normalised Mamba, its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

import zoo
from zoo.architectures import jamba
from zoo.errors import ZooError

CONFIGS: dict[str, dict[str, Any]] = {
    "experts": dict(
        model_type="jamba",
        vocab_size=101,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=3,
        attn_layer_offset=1,
        num_experts=5,
        num_experts_per_tok=2,
        mamba_d_state=8,
        max_position_embeddings=512,
    ),
    "dense": dict(
        model_type="jamba",
        vocab_size=83,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=12,
        attn_layer_period=3,
        attn_layer_offset=2,
        num_experts=1,
        mamba_d_state=5,
        mamba_d_conv=3,
        mamba_expand=3,
        mamba_dt_rank=7,
        mamba_conv_bias=False,
        mamba_proj_bias=True,
        rms_norm_eps=1e-3,
        tie_word_embeddings=True,
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_jamba(case: str, tmp_path: Path) -> None:
    ours = assert_published(CONFIGS[case], tmp_path)
    decoder = ours.config.decoder_config
    assert ours.config.architecture == "jamba"
    if case == "experts":
        assert [layer.mixer for layer in decoder.layers] == ["mamba", "attention", "mamba", "mamba"]
        assert [layer.channel for layer in decoder.layers] == ["swiglu", "moe", "swiglu", "moe"]
    else:
        assert [layer.mixer for layer in decoder.layers] == ["mamba", "mamba", "attention"]
        assert {layer.channel for layer in decoder.layers} == {"swiglu"}
    assert not decoder.ropes
    assert {layer.mixer_args["norm"] for layer in decoder.layers if layer.mixer == "mamba"} == {"rms"}


def test_published_layout() -> None:
    layers = jamba.layout(**jamba.PRESETS["52b"]).layers
    assert [i for i, layer in enumerate(layers) if layer.mixer == "attention"] == [4, 12, 20, 28]
    assert [i for i, layer in enumerate(layers) if layer.channel == "moe"] == list(range(1, 32, 2))
    assert all(layer.mixer_args.get("rope") is None for layer in layers)
    large = jamba.layout(**jamba.PRESETS["398b"]).layers
    assert [i for i, layer in enumerate(large) if layer.mixer == "attention"] == list(range(4, 72, 8))


def test_presets_can_be_published() -> None:
    for preset in jamba.PRESETS:
        decoder = zoo.config("jamba", preset).decoder_config
        assert jamba.decoder(jamba.published(decoder, {})) == jamba.layout(**jamba.PRESETS[preset])


@pytest.mark.parametrize(("field", "value"), [("sliding_window", 64), ("mamba_inner_layernorms", False)])
def test_what_transformers_does_not_compute_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ZooError, match=field):
        jamba.decoder({**CONFIGS["dense"], field: value})
