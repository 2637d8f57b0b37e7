"""Zamba2's hybrid layer (Glorioso et al. 2024, arXiv 2411.15242): the channel's output enters the mixer alone.

`x + mixer(norm(x + channel(x)))`.
"""

from __future__ import annotations

from torch import Tensor

from zoo.architectures.core.block import Block, Run
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Args
from zoo.architectures.core.norms import make_norm
from zoo.errors import ZooError


class Zamba2(Block):
    def build(self, config: DecoderConfig, args: Args) -> None:
        if self.mixer is None or self.channel is None:
            raise ZooError("block 'zamba2' needs a mixer and a channel; a layer of one part is a pre_norm layer")
        self.mixer_norm = make_norm(config.norm, config.hidden_size)

    def wire(self, x: Tensor, run: Run) -> Tensor:
        return x + run.mix(self.mixer_norm(x + run.transform(x)))


MODULE = Zamba2
