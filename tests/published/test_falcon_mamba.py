"""Falcon-Mamba as transformers publishes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

import zoo
from zoo.architectures import falcon_mamba

CONFIGS: dict[str, dict[str, Any]] = {
    "published": dict(
        model_type="falcon_mamba", vocab_size=101, hidden_size=48, num_hidden_layers=3, tie_word_embeddings=False
    ),
    "odd": dict(
        model_type="falcon_mamba",
        vocab_size=83,
        hidden_size=40,
        num_hidden_layers=2,
        state_size=5,
        intermediate_size=72,
        conv_kernel=2,
        use_bias=True,
        use_conv_bias=False,
        time_step_rank=7,
        layer_norm_epsilon=1e-3,
        mixer_rms_eps=0.02,
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_falcon_mamba(case: str, tmp_path: Path) -> None:
    ours = assert_published(CONFIGS[case], tmp_path)
    args = ours.config.decoder_config.layers[0].mixer_args
    assert ours.config.architecture == "falcon_mamba"
    assert (args["norm"], args["norm_eps"]) == ("weightless", 1e-6 if case == "published" else 0.02)
    assert args["inner"] == (96 if case == "published" else 72)


def test_presets_can_be_published() -> None:
    for preset in falcon_mamba.PRESETS:
        decoder = zoo.config("falcon_mamba", preset).decoder_config
        config = falcon_mamba.published(decoder, {})
        assert falcon_mamba.decoder(config) == falcon_mamba.layout(**falcon_mamba.PRESETS[preset])
