"""gpt-oss against transformers' own class, also with its experts in MXFP4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

from zoo.architectures import gpt_oss
from zoo.errors import ZooError

SMALL: dict[str, Any] = dict(
    model_type="gpt_oss",
    vocab_size=101,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=9,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    rope_parameters=dict(gpt_oss.YARN, original_max_position_embeddings=32, factor=8.0, rope_theta=150000.0),
)
OTHER: dict[str, Any] = dict(
    SMALL,
    num_key_value_heads=4,
    head_dim=10,
    intermediate_size=28,
    num_local_experts=5,
    num_experts_per_tok=3,
    attention_bias=False,
    layer_types=["full_attention", "full_attention", "sliding_attention"],
    sliding_window=33,
    rms_norm_eps=1e-4,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)


def windows(decoder: Any) -> list[int | None]:
    return [layer.mixer_args.get("window") for layer in decoder.layers]


def test_gpt_oss_is_transformers_gpt_oss(tmp_path: Path) -> None:
    ours = assert_published(SMALL, tmp_path)
    layers = ours.config.decoder_config.layers
    assert windows(ours.config.decoder_config) == [9, None, 9]
    assert all(layer.mixer_args["sink_logits"] and layer.mixer_args["o_bias"] for layer in layers)


def test_other_options(tmp_path: Path) -> None:
    ours = assert_published(OTHER, tmp_path)
    assert windows(ours.config.decoder_config) == [None, None, 33]
    assert ours.config.tie_word_embeddings


def test_released_sizes() -> None:
    for preset, depth in (("20b", 24), ("120b", 36)):
        decoder = gpt_oss.layout(**gpt_oss.PRESETS[preset])
        assert windows(decoder) == [128, None] * (depth // 2)
        assert decoder.ropes["default"].scaling["truncate"] is False
        config = gpt_oss.published(decoder, {})
        assert config["rope_parameters"]["factor"] == 32.0 and config["num_experts_per_tok"] == 4


@pytest.mark.parametrize("field", [{"hidden_act": "gelu"}, {"swiglu_limit": 5.0}, {"layer_types": ["full_attention"]}])
def test_what_we_do_not_have_is_refused_by_name(field: dict[str, Any]) -> None:
    with pytest.raises(ZooError, match=next(iter(field))):
        gpt_oss.decoder({**SMALL, **field})
