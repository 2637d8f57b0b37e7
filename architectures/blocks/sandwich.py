"""Residual block with a norm before and after each branch (Gemma 2, arXiv 2408.00118; Gemma 3, arXiv 2503.19786).

`x + norm(mixer(norm(x)))`, then `x + norm(channel(norm(x)))`.
"""

from __future__ import annotations

from torch import Tensor

from zoo.architectures.core.block import Block, Run
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Args
from zoo.architectures.core.norms import make_norm


class Sandwich(Block):
    def build(self, config: DecoderConfig, args: Args) -> None:
        for name, part in (("mixer", self.mixer), ("channel", self.channel)):
            if part is not None:
                self.add_module(f"{name}_norm", make_norm(config.norm, config.hidden_size))
                self.add_module(f"{name}_post_norm", make_norm(config.norm, config.hidden_size))

    def wire(self, x: Tensor, run: Run) -> Tensor:
        if self.mixer is not None:
            x = x + self.mixer_post_norm(run.mix(self.mixer_norm(x)))
        if self.channel is not None:
            x = x + self.channel_post_norm(run.transform(self.channel_norm(x)))
        return x


MODULE = Sandwich
