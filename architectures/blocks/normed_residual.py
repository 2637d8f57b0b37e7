"""Pre-norm residual block whose residual is the normed stream (MiniMax-01, arXiv 2501.08313).

`h = norm(x)`, then `alpha h + beta f(h)`, for the mixer and then for the channel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoo.architectures.core import mixer
from zoo.architectures.core.block import Block, Run
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.norms import make_norm

EXAMPLE = {"mixer_alpha": 1.5, "channel_beta": 0.5}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`alpha` multiplies the normed stream, `beta` the branch."""

    mixer_alpha: float = 1.0
    mixer_beta: float = 1.0
    channel_alpha: float = 1.0
    channel_beta: float = 1.0


class NormedResidual(Block):
    options = Args

    def build(self, config: DecoderConfig, args: Args) -> None:  # type: ignore[override]
        self.args = args
        if self.mixer is not None:
            self.mixer_norm = make_norm(config.norm, config.hidden_size)
        if self.channel is not None:
            self.channel_norm = make_norm(config.norm, config.hidden_size)

    def wire(self, x: Tensor, run: Run) -> Tensor:
        if self.mixer is not None:
            x = self.mixer_norm(x)
            x = x * self.args.mixer_alpha + run.mix(x) * self.args.mixer_beta
        if self.channel is not None:
            x = self.channel_norm(x)
            x = x * self.args.channel_alpha + run.transform(x) * self.args.channel_beta
        return x


MODULE = NormedResidual
