"""RWKV's channel mixing: a squared-ReLU channel over a mix of each token with the one before.

    y_t = sigmoid(x^r_t W_r) * (relu(x^k_t W_k)^2 W_v)        without the sigmoid gate in RWKV-7

Versions 4 and 5 (Peng et al. 2023, arXiv 2305.13048; 2024, arXiv 2404.05892) weigh the token itself,
x^j_t = mu_j x_t + (1 - mu_j) x_{t-1}; versions 6 and 7 (arXiv 2404.05892, 2503.14456) the one before.

B batch, T new tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Part
from zoo.architectures.core.token_shift import DepthArgs, mixed, ramp, token_shift
from zoo.errors import ZooError

EXAMPLE = {"intermediate_size": 96, "layer_index": 1, "depth": 3}
VARIANTS = {
    "rwkv6": {**EXAMPLE, "weighs": "before"},
    "rwkv7": {**EXAMPLE, "weighs": "before", "gate": False, "mix_power": 4.0},
}


@dataclass(frozen=True, kw_only=True)
class Args(DepthArgs):
    """`weighs` is the token that the mixing weights multiply, `own` or the one `before`; `gate` is the sigmoid gate;
    the weights start along the `mix_power`-th power of the layer's share of the depth."""

    intermediate_size: int
    gate: bool = True
    weighs: str = "own"
    mix_power: float = 1.0

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(intermediate_size=self.intermediate_size)
        if self.weighs not in ("own", "before"):
            raise ZooError(f"weighs {self.weighs!r} is unknown; it must be own or before")


class RWKVChannelMix(Part):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.width = args, config.hidden_size
        self.up_proj = nn.Linear(self.width, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, self.width, bias=False)
        self.mix_k = nn.Parameter(torch.zeros(self.width))
        if args.gate:
            self.gate_proj = nn.Linear(self.width, self.width, bias=False)
            self.mix_r = nn.Parameter(torch.zeros(self.width))

    def init_weights(self, std: float) -> None:
        own = ramp(self.width) ** (self.args.left**self.args.mix_power)
        start = own if self.args.weighs == "own" else 1 - own
        initialization.copy_(self.mix_k, start)
        if self.args.gate:
            initialization.copy_(self.mix_r, start)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        first, second = x, token_shift(x, ctx, cache)
        if self.args.weighs == "own":
            first, second = second, first
        y = self.down_proj(F.relu(self.up_proj(mixed(first, second, self.mix_k))).square())
        return y * self.gate_proj(mixed(first, second, self.mix_r)).sigmoid() if self.args.gate else y

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return self.width * itemsize


MODULE = RWKVChannelMix
