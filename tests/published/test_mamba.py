"""Mamba as transformers publishes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

import zoo
from zoo.architectures import mamba
from zoo.errors import ZooError

CONFIGS: dict[str, dict[str, Any]] = {
    "published": dict(
        model_type="mamba", vocab_size=101, hidden_size=48, num_hidden_layers=3, state_size=16, initializer_range=0.05
    ),
    "odd": dict(
        model_type="mamba",
        vocab_size=83,
        hidden_size=40,
        num_hidden_layers=2,
        state_size=5,
        expand=3,
        conv_kernel=3,
        use_bias=True,
        use_conv_bias=False,
        time_step_rank=7,
        layer_norm_epsilon=1e-3,
        tie_word_embeddings=False,
        residual_in_fp32=False,
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_mamba(case: str, tmp_path: Path) -> None:
    config = CONFIGS[case]
    ours = assert_published(config, tmp_path)
    decoder = ours.config.decoder_config
    assert ours.config.architecture == "mamba"
    assert [(layer.mixer, layer.channel) for layer in decoder.layers] == [("mamba", None)] * config["num_hidden_layers"]
    args = decoder.layers[0].mixer_args
    assert (args["inner"], args["dt_rank"]) == ((96, 3) if case == "published" else (120, 7))


def test_the_inner_size_wins_over_the_factor() -> None:
    config = {**CONFIGS["odd"], "expand": 16, "intermediate_size": 84}
    assert mamba.decoder(config).layers[0].mixer_args["inner"] == 84


def test_what_is_not_silu_is_refused() -> None:
    with pytest.raises(ZooError, match="hidden_act 'gelu'"):
        mamba.decoder({**CONFIGS["odd"], "hidden_act": "gelu"})


@pytest.mark.parametrize("preset", mamba.PRESETS)
def test_presets_can_be_published(preset: str) -> None:
    decoder = zoo.config("mamba", preset).decoder_config
    config = mamba.published(decoder, {})
    assert mamba.decoder(config) == mamba.layout(**mamba.PRESETS[preset])
