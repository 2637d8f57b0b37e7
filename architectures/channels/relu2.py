"""Squared ReLU channel (So et al. 2021, arXiv 2109.08668): `down(max(up(x), 0)^2)`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.architectures.core import mixer
from zoo.architectures.core.activations import relu2
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context, Part
from zoo.errors import ZooError

EXAMPLE = {"intermediate_size": 96, "bias": True}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    intermediate_size: int
    bias: bool = False

    def check(self, config: DecoderConfig) -> None:
        if self.intermediate_size <= 0:
            raise ZooError(f"intermediate_size was {self.intermediate_size}; it must be positive")


class SquaredReLU(Part):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, args.intermediate_size, bias=args.bias)
        self.down_proj = nn.Linear(args.intermediate_size, config.hidden_size, bias=args.bias)

    def forward(self, x: Tensor, ctx: Context, cache: object = None) -> Tensor:
        return self.down_proj(relu2(self.up_proj(x)))


MODULE = SquaredReLU
