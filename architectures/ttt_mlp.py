"""TTT-MLP (Sun et al. 2024, arXiv 2407.04620) throughout: the state is a two-layer network that learns as it reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zoo.architectures import ttt_linear
from zoo.architectures.core.config import DecoderConfig

PRESETS = ttt_linear.PRESETS  # the paper's models differ in the inner network alone


def layout(*, base_lr: float = 0.1, **sizes: Any) -> DecoderConfig:
    """The layers of `ttt_linear.layout`, whose `sizes` are taken, with the mixer `ttt_mlp`."""
    decoder = ttt_linear.layout(base_lr=base_lr, **sizes)
    return replace(decoder, layers=tuple(replace(layer, mixer="ttt_mlp") for layer in decoder.layers))
