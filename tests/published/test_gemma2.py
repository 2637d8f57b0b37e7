"""Gemma 2 against transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

from zoo.architectures import gemma2
from zoo.errors import ZooError

SMALL: dict[str, Any] = dict(
    model_type="gemma2",
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=20,
    sliding_window=9,
    max_position_embeddings=256,
)
OTHER: dict[str, Any] = dict(
    SMALL,
    num_hidden_layers=4,
    num_key_value_heads=4,
    head_dim=10,
    hidden_activation="gelu",
    attention_bias=True,
    layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    sliding_window=33,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=None,
    rms_norm_eps=1e-4,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
)


def test_gemma2_is_transformers_gemma2(tmp_path: Path) -> None:
    ours = assert_published(SMALL, tmp_path)
    layers = ours.config.decoder_config.layers
    assert [layer.mixer_args.get("window") for layer in layers] == [9, None, 9]
    assert {layer.block for layer in layers} == {"sandwich"}


def test_other_options(tmp_path: Path) -> None:
    ours = assert_published(OTHER, tmp_path)
    assert [layer.mixer_args.get("window") for layer in ours.config.decoder_config.layers] == [None, 33, 33, None]
    assert not ours.config.tie_word_embeddings


def test_published_sizes_alternate() -> None:
    for preset, scale in (("2b", 256), ("9b", 256), ("27b", 144)):
        decoder = gemma2.layout(**gemma2.PRESETS[preset])
        windows = [layer.mixer_args.get("window") for layer in decoder.layers]
        assert windows == [4096, None] * (len(windows) // 2)
        assert {layer.mixer_args["scale"] for layer in decoder.layers} == {scale**-0.5}
        gemma2.published(decoder, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_activation", "silu"),
        ("use_bidirectional_attention", True),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["full_attention", "conv", "full_attention"]),
        ("sliding_window", None),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(field: str, value: Any) -> None:
    name = "rope_type" if field == "rope_parameters" else field
    with pytest.raises(ZooError, match=name):
        gemma2.decoder({**SMALL, field: value})
