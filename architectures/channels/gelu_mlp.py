"""GELU channel (Hendrycks and Gimpel 2016, arXiv 1606.08415; Radford et al. 2018): `down(gelu(up(x)))`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoo.architectures.channels import relu2
from zoo.architectures.core.activations import ACTIVATIONS
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context
from zoo.errors import ZooError

GELUS = ("gelu", "gelu_tanh", "gelu_sigmoid")
EXAMPLE = {"intermediate_size": 96}
VARIANTS = {"exact": {"intermediate_size": 96, "activation": "gelu", "bias": False}}


@dataclass(frozen=True, kw_only=True)
class Args(relu2.Args):
    """`activation` is gelu (exact), gelu_tanh or gelu_sigmoid (approximations by those functions)."""

    bias: bool = True
    activation: str = "gelu_tanh"

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        if self.activation not in GELUS:
            raise ZooError(f"activation was {self.activation!r}; it must be one of {', '.join(GELUS)}")


class GeluMLP(relu2.SquaredReLU):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        self.activation = ACTIVATIONS[args.activation]

    def forward(self, x: Tensor, ctx: Context, cache: object = None) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


MODULE = GeluMLP
