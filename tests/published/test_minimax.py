"""MiniMax-01 against transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

from zoo.architectures import minimax01
from zoo.errors import ZooError

DECAYS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
SMALL: dict[str, Any] = dict(
    model_type="minimax",
    vocab_size=101,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=4,
    layer_types=["linear_attention", "linear_attention", "full_attention"],
    block_size=32,
    max_position_embeddings=256,
    full_attn_alpha_factor=3.5,
    linear_attn_alpha_factor=1.5,
    linear_attn_beta_factor=0.75,
    mlp_alpha_factor=2.5,
)
OTHER: dict[str, Any] = dict(
    SMALL,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=20,
    layer_types=None,
    num_local_experts=5,
    num_experts_per_tok=3,
    sliding_window=21,
    block_size=256,
    full_attn_beta_factor=0.5,
    mlp_beta_factor=1.25,
    rms_norm_eps=1e-3,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
)


def test_minimax_is_transformers_minimax(tmp_path: Path) -> None:
    decoder = assert_published(SMALL, tmp_path, derived=DECAYS).config.decoder_config
    assert [layer.mixer for layer in decoder.layers] == ["lightning", "lightning", "attention"]
    assert [layer.block_args["mixer_alpha"] for layer in decoder.layers] == [1.5, 1.5, 3.5]


def test_other_options(tmp_path: Path) -> None:
    decoder = assert_published(OTHER, tmp_path, derived=DECAYS).config.decoder_config
    assert [layer.mixer for layer in decoder.layers] == ["attention", "lightning"], (
        "what transformers alternates by itself"
    )
    assert decoder.layers[0].mixer_args["window"] == 21


def test_the_released_size() -> None:
    decoder = minimax01.layout(**minimax01.PRESETS["456b"])
    softmax = [index for index, layer in enumerate(decoder.layers) if layer.mixer == "attention"]
    assert softmax == list(range(7, 80, 8))
    assert [layer.mixer_args["layer_index"] for layer in decoder.layers if layer.mixer == "lightning"][:8] == [
        *range(7),
        8,
    ]
    assert decoder.ropes["default"].dim == 64
    config = minimax01.published(decoder, {})
    assert config["rotary_dim"] == 64 and config["mlp_alpha_factor"] == pytest.approx(3.5565588)


def test_the_names_of_the_config_first_published() -> None:
    decoder = minimax01.layout(**minimax01.PRESETS["456b"])
    config = minimax01.published(decoder, {})
    older = {new: old for old, new in minimax01.OLDER.items()}
    first = {older.get(name, name): value for name, value in config.items() if name != "layer_types"}
    first |= {"model_type": "minimax_text_01", "postnorm": True, "shared_intermediate_size": 0}
    first["attn_type_list"] = [int(layer.mixer == "attention") for layer in decoder.layers]
    assert minimax01.matches(first) and minimax01.decoder(first) == decoder


@pytest.mark.parametrize(
    "field",
    [
        {"hidden_act": "gelu"},
        {"router_jitter_noise": 0.1},
        {"shared_intermediate_size": 8},
        {"postnorm": False},
        {"layer_types": ["full_attention"]},
    ],
)
def test_what_we_do_not_have_is_refused_by_name(field: dict[str, Any]) -> None:
    with pytest.raises(ZooError, match=next(iter(field))):
        minimax01.decoder({**SMALL, **field})
