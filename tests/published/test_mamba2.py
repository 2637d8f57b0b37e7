"""Mamba-2 as transformers publishes it, its fused projections split."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

import zoo
from zoo.architectures import codestral_mamba, mamba2
from zoo.errors import ZooError

CONFIGS: dict[str, dict[str, Any]] = {
    "published": dict(
        model_type="mamba2",
        vocab_size=101,
        hidden_size=48,
        num_hidden_layers=3,
        num_heads=6,
        head_dim=16,
        state_size=24,
        n_groups=1,
        chunk_size=16,
        tie_word_embeddings=True,
    ),
    "grouped": dict(
        model_type="mamba2",
        vocab_size=83,
        hidden_size=40,
        num_hidden_layers=2,
        num_heads=15,
        head_dim=8,
        expand=3,
        state_size=7,
        n_groups=5,
        conv_kernel=3,
        use_bias=True,
        use_conv_bias=False,
        chunk_size=32,
        time_step_limit=[0.05, 0.4],
        layer_norm_epsilon=1e-3,
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_mamba2(case: str, tmp_path: Path) -> None:
    config = CONFIGS[case]
    ours = assert_published(config, tmp_path)
    decoder = ours.config.decoder_config
    assert ours.config.architecture == "mamba2"
    assert [(layer.mixer, layer.channel) for layer in decoder.layers] == [("mamba2", None)] * len(decoder.layers)
    assert decoder.head.tied is (case == "published")
    limit = decoder.layers[0].mixer_args["time_step_limit"]
    assert limit == (None if case == "published" else (0.05, 0.4))


def test_heads_that_do_not_make_up_the_width_are_refused() -> None:
    with pytest.raises(ZooError, match="num_heads 15 of head_dim 4"):
        mamba2.decoder({**CONFIGS["grouped"], "head_dim": 4})


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.0, {"__float__": "Infinity"}), None])
def test_no_limit_on_time_steps_however_it_is_written(limit: Any) -> None:
    config = {**CONFIGS["published"], "time_step_limit": limit}
    assert mamba2.decoder(config).layers[0].mixer_args["time_step_limit"] is None


@pytest.mark.parametrize("module", [mamba2, codestral_mamba])
def test_presets_can_be_published(module: Any) -> None:
    name = module.__name__.rpartition(".")[2]
    for preset in module.PRESETS:
        decoder = zoo.config(name, preset).decoder_config
        config = mamba2.published(decoder, {})
        assert mamba2.decoder(config) == module.layout(**module.PRESETS[preset])


def test_codestral_is_mamba2_as_published() -> None:
    published = dict(
        vocab_size=32768, hidden_size=4096, num_hidden_layers=64, num_heads=128, max_position_embeddings=262144
    )
    assert mamba2.decoder(published) == codestral_mamba.layout(**codestral_mamba.PRESETS["7b"])
