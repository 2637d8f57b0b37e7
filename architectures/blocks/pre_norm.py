"""Pre-norm residual block (Xiong et al. 2020, arXiv 2002.04745).

`x + s mixer(norm(x))`, then `x + s channel(norm(x))`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoo.architectures.core import mixer
from zoo.architectures.core.block import Block, Run
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.norms import make_norm


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`residual_scale` multiplies both branches (Granite)."""

    residual_scale: float = 1.0


class PreNorm(Block):
    options = Args

    def build(self, config: DecoderConfig, args: Args) -> None:  # type: ignore[override]
        self.residual_scale = args.residual_scale
        if self.mixer is not None:
            self.mixer_norm = make_norm(config.norm, config.hidden_size)
        if self.channel is not None:
            self.channel_norm = make_norm(config.norm, config.hidden_size)

    def wire(self, x: Tensor, run: Run) -> Tensor:
        if self.mixer is not None:
            x = x + self._scaled(run.mix(self.mixer_norm(x)))
        if self.channel is not None:
            x = x + self._scaled(run.transform(self.channel_norm(x)))
        return x

    def _scaled(self, branch: Tensor) -> Tensor:
        return branch if self.residual_scale == 1.0 else branch * self.residual_scale


MODULE = PreNorm
