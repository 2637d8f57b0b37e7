"""LFM2 against transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

from zoo.architectures import lfm2
from zoo.errors import ZooError

SMALL: dict[str, Any] = dict(
    model_type="lfm2",
    vocab_size=101,
    hidden_size=48,
    intermediate_size=100,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    block_multiple_of=16,
    full_attn_idxs=[1, 3],
    max_position_embeddings=256,
)
OTHER: dict[str, Any] = dict(
    SMALL,
    num_hidden_layers=3,
    num_key_value_heads=4,
    full_attn_idxs=None,
    layer_types=["full_attention", "conv", "conv"],
    conv_bias=True,
    conv_L_cache=5,
    norm_eps=1e-3,
    block_auto_adjust_ff_dim=False,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
)


def mixers(decoder: Any) -> list[str]:
    return [layer.mixer for layer in decoder.layers]


def test_lfm2_is_transformers_lfm2(tmp_path: Path) -> None:
    decoder = assert_published(SMALL, tmp_path).config.decoder_config
    assert mixers(decoder) == ["gated_short_conv", "attention"] * 2
    assert {layer.channel_args["intermediate_size"] for layer in decoder.layers} == {80}  # 100 * 2 / 3, rounded up
    assert decoder.ropes["default"].theta == 1e6


def test_other_options(tmp_path: Path) -> None:
    decoder = assert_published(OTHER, tmp_path).config.decoder_config
    assert mixers(decoder) == ["attention", "gated_short_conv", "gated_short_conv"]
    assert {layer.channel_args["intermediate_size"] for layer in decoder.layers} == {100}


@pytest.mark.parametrize(("preset", "size"), [("350m", 6656), ("700m", 10240), ("1b2", 12288)])
def test_a_config_of_the_hub_is_the_preset(preset: str, size: int) -> None:
    sizes = lfm2.PRESETS[preset]
    config = dict(
        model_type="lfm2",
        vocab_size=65536,
        hidden_size=sizes["hidden_size"],
        block_dim=sizes["hidden_size"],
        conv_dim=sizes["hidden_size"],
        num_hidden_layers=16,
        num_attention_heads=sizes["heads"],
        num_key_value_heads=8,
        block_ff_dim=size,
        full_attn_idxs=[2, 5, 8, 10, 12, 14],
        tie_embedding=True,
        rope_theta=1000000.0,
    )
    decoder = lfm2.decoder(config)
    assert decoder == lfm2.layout(**sizes)
    assert mixers(decoder).count("attention") == 6
    lfm2.published(decoder, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [("layer_types", ["conv"]), ("block_use_swiglu", False), ("conv_dim", 32), ("partial_rotary_factor", 0.5)],
)
def test_what_we_do_not_compute_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ZooError, match=field):
        lfm2.decoder({**SMALL, field: value})
