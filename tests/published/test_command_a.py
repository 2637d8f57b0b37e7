"""Command A against transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

from zoo.architectures import command_a
from zoo.errors import ZooError

SMALL: dict[str, Any] = dict(
    model_type="cohere2",
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=9,
    logit_scale=0.25,
    max_position_embeddings=256,
)
OTHER: dict[str, Any] = dict(
    SMALL,
    num_hidden_layers=4,
    num_key_value_heads=None,
    attention_bias=True,
    layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    sliding_window=33,
    logit_scale=1.7,
    layer_norm_eps=1e-3,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
)


def test_command_a_is_transformers_cohere2(tmp_path: Path) -> None:
    decoder = assert_published(SMALL, tmp_path).config.decoder_config
    assert [layer.mixer_args.get("window") for layer in decoder.layers] == [9, 9, 9, None, 9]
    assert [layer.mixer_args.get("rope") for layer in decoder.layers] == ["default"] * 3 + [None, "default"]
    assert decoder.ropes["default"].pairing == "interleaved" and not decoder.norm.bias


def test_other_options(tmp_path: Path) -> None:
    decoder = assert_published(OTHER, tmp_path).config.decoder_config
    assert [layer.mixer_args.get("rope") for layer in decoder.layers] == [None, "default", "default", None]


def test_the_pattern_of_a_config_of_the_hub() -> None:
    """Files of the hub give the period of full attention, not a list."""
    config = {
        **SMALL,
        "sliding_window_pattern": 2,
        "rope_theta": 50000,
        "use_parallel_block": True,
        "use_qk_norm": False,
    }
    decoder = command_a.decoder(config)
    assert [layer.mixer_args.get("window") for layer in decoder.layers] == [9, None, 9, None, 9]
    assert decoder.ropes["default"].theta == 50000.0


@pytest.mark.parametrize("preset", ["r7b", "111b"])
def test_published_sizes_are_full_in_each_fourth_layer(preset: str) -> None:
    decoder = command_a.layout(**command_a.PRESETS[preset])
    for index, layer in enumerate(decoder.layers):
        full = (index + 1) % 4 == 0
        assert layer.mixer_args.get("window") == (None if full else 4096)
        assert layer.mixer_args.get("rope") == (None if full else "default")
        assert layer.block == "parallel"
    command_a.published(decoder, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("use_qk_norm", True),
        ("use_parallel_block", False),
        ("sliding_window", None),
        ("head_dim", 24),
        ("layer_types", ["chunked_attention"] * 5),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ZooError, match=field):
        command_a.decoder({**SMALL, field: value})
