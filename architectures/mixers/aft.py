"""Attention-free Transformer, AFT-Simple (Zhai et al. 2021, arXiv 2105.14103): a running average per channel.

    y_t = (sigmoid(q_t) * sum over s <= t of exp(k_s) v_s / sum over s <= t of exp(k_s)) W_o,   q, k, v = x W

AFT-full and AFT-local add a learned bias w_ts to k_s, which makes the cost quadratic; they are not offered.

B batch, T new tokens, D hidden size, A channels of the average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoo.architectures.core import mixer
from zoo.architectures.core.averaged import average_bytes, averaged
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer

EXAMPLE = {"attention_size": 48}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`attention_size` is A (None: the hidden size)."""

    attention_size: int | None = None

    def check(self, config: DecoderConfig) -> None:
        check_sizes(attention_size=self.attention_size)


class AFT(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        hidden, self.channels = config.hidden_size, args.attention_size or config.hidden_size
        self.q_proj = nn.Linear(hidden, self.channels, bias=False)
        self.k_proj = nn.Linear(hidden, self.channels, bias=False)
        self.v_proj = nn.Linear(hidden, self.channels, bias=False)
        self.o_proj = nn.Linear(self.channels, hidden, bias=False)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return {}

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(q.sigmoid() * averaged(k, v, None, None, ctx, cache).to(q.dtype))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return average_bytes(self.channels)


MODULE = AFT
