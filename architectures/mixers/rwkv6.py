"""RWKV-6 "Finch" time mixing (Peng et al. 2024, arXiv 2404.05892): RWKV-5 with mixing weights and decays that the
tokens choose, through low-rank maps.

    w_t = exp(-exp(time_decay + tanh(x^w_t A) B)),   S_t = Diag(w_t) S_{t-1} + k_t^T v_t
    x^j_t = x_t + (x_{t-1} - x_t) * (mu_j + tanh(x^x_t A_mix)_j B_j),   j in w, k, v, r, g

B batch, T new tokens, D hidden size, H heads, K head dimension, R rank of the mix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, grouped
from zoo.architectures.core.token_shift import HeadArgs, LowRank, mixed
from zoo.architectures.mixers.rwkv5 import RWKV5

EXAMPLE = {"heads": 2, "head_dim": 16, "mix_rank": 8, "decay_rank": 12, "layer_index": 1, "depth": 3}
CHOSEN = ("w", "k", "v", "r", "g")  # in the order of `mix_up`


@dataclass(frozen=True, kw_only=True)
class Args(HeadArgs):
    """`mix_rank` is R, `decay_rank` the rank of A and B."""

    mix_rank: int = 32
    decay_rank: int = 64

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(mix_rank=self.mix_rank, decay_rank=self.decay_rank)


class RWKV6(RWKV5):
    options = Args
    mixes = ("x", *CHOSEN)
    mix_x: nn.Parameter

    def make_decay(self, config: DecoderConfig, args: Args) -> None:  # type: ignore[override]
        self.mix_down = nn.Linear(config.hidden_size, len(CHOSEN) * args.mix_rank, bias=False)
        self.mix_up = nn.Parameter(torch.zeros(len(CHOSEN), config.hidden_size, args.mix_rank))
        self.decay_map = LowRank(config.hidden_size, args.decay_rank, args.heads * args.head_dim, torch.tanh)

    @property
    def time_decay(self) -> Tensor:  # type: ignore[override]
        return self.decay_map.offset

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        initialization.uniform_(self.mix_up, -0.01, 0.01)

    def start_of_mixes(self) -> dict[str, Tensor]:
        """Shares of the token before."""
        own = super().start_of_mixes()
        return {name: 1 - own["k" if name in "xw" else name] for name in self.mixes}

    def inputs(self, x: Tensor, before: Tensor) -> dict[str, Tensor]:
        hidden = self.mix_down(mixed(x, before, self.mix_x)).tanh().unflatten(-1, (len(CHOSEN), -1))
        shares = torch.einsum("btnr,ndr->nbtd", hidden, self.mix_up.to(hidden.dtype))
        return {
            name: mixed(x, before, getattr(self, f"mix_{name}") + share)
            for name, share in zip(CHOSEN, shares, strict=True)
        }

    def decay(self, inputs: dict[str, Tensor], ctx: Context) -> Tensor:
        """Log decay `[B, T, H, K]` in fp32; padding does not forget."""
        return ctx.mask(grouped(-self.decay_map(inputs["w"]).exp(), self.heads))


MODULE = RWKV6
