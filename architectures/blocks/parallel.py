"""Mixer and channel side by side (Wang and Komatsuzaki 2021, GPT-J; Command A, arXiv 2504.00698).

`x + mixer(norm(x)) + channel(norm(x))`, with one norm for both or one for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoo.architectures.core import mixer
from zoo.architectures.core.block import Block, Run
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.norms import make_norm
from zoo.errors import ZooError

VARIANTS = {"norms_2": {"norms": 2}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`norms` is 1 (shared) or 2 (one for the mixer, one for the channel)."""

    norms: int = 1

    def check(self, config: DecoderConfig) -> None:
        if self.norms not in (1, 2):
            raise ZooError(f"norms was {self.norms}; it must be 1 or 2")


class Parallel(Block):
    options = Args

    def build(self, config: DecoderConfig, args: Args) -> None:  # type: ignore[override]
        if self.mixer is None or self.channel is None:
            raise ZooError("block 'parallel' needs a mixer and a channel; a layer of one part is a pre_norm layer")
        self.norms = args.norms
        for name in ("norm",) if args.norms == 1 else ("mixer_norm", "channel_norm"):
            self.add_module(name, make_norm(config.norm, config.hidden_size))

    def wire(self, x: Tensor, run: Run) -> Tensor:
        if self.norms == 1:
            normed = self.norm(x)
            return x + run.mix(normed) + run.transform(normed)
        return x + run.mix(self.mixer_norm(x)) + run.transform(self.channel_norm(x))


MODULE = Parallel
