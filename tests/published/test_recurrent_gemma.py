"""RecurrentGemma against transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_published

from zoo.architectures import recurrent_gemma
from zoo.errors import ZooError

SMALL: dict[str, Any] = dict(
    model_type="recurrent_gemma",
    vocab_size=101,
    hidden_size=48,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
    attention_window_size=9,
)
OTHER: dict[str, Any] = dict(
    SMALL,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=None,
    block_types=["attention", "recurrent"],
    attention_window_size=33,
    attention_bias=True,
    conv1d_width=3,
    hidden_activation="gelu",
    logits_soft_cap=2.0,
    rms_norm_eps=1e-3,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
)


def mixers(decoder: Any) -> list[str]:
    return [layer.mixer for layer in decoder.layers]


def test_recurrent_gemma_is_transformers_recurrent_gemma(tmp_path: Path) -> None:
    decoder = assert_published(SMALL, tmp_path).config.decoder_config
    assert mixers(decoder) == ["rg_lru", "rg_lru", "attention", "rg_lru"]
    assert decoder.layers[2].mixer_args["window"] == 9
    assert decoder.ropes["default"].dim == 6  # half of each head


def test_other_options(tmp_path: Path) -> None:
    decoder = assert_published(OTHER, tmp_path).config.decoder_config
    assert mixers(decoder) == ["attention", "rg_lru", "attention"]
    assert decoder.ropes["default"].dim == 6  # a quarter


def test_published_sizes_are_two_to_one() -> None:
    for preset in ("2b", "9b"):
        decoder = recurrent_gemma.layout(**recurrent_gemma.PRESETS[preset])
        assert [name == "attention" for name in mixers(decoder)] == [i % 3 == 2 for i in range(len(decoder.layers))]
        assert {layer.mixer_args.get("window") for layer in decoder.layers} == {None, 2048}
        assert decoder.embed.scale == torch.tensor(decoder.hidden_size**0.5).bfloat16().item()
        recurrent_gemma.published(decoder, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_activation", "silu"),
        ("block_types", ["recurrent", "mamba"]),
        ("embeddings_scale_by_sqrt_dim", False),
        ("head_dim", 24),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(field: str, value: Any) -> None:
    name = "rope_type" if field == "rope_parameters" else field
    with pytest.raises(ZooError, match=name):
        recurrent_gemma.decoder({**SMALL, field: value})
