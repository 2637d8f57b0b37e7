"""What RWKV's mixers and channels share: token shift, low-rank maps, and how mixing weights and decays start.

B batch, T new tokens, D hidden size, R rank, H heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.cache_view import CacheView
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, keep_fp32, wide
from zoo.errors import ZooError


@dataclass(frozen=True, kw_only=True)
class DepthArgs(mixer.Args):
    """`layer_index` (from 0) of `depth` layers: mixing weights and decays start at values that depend on it."""

    layer_index: int = 0
    depth: int = 1

    def check(self, config: DecoderConfig) -> None:
        if not 0 <= self.layer_index < self.depth:
            raise ZooError(f"layer_index was {self.layer_index}; it must be from 0 to {self.depth - 1} (depth - 1)")

    @property
    def risen(self) -> float:
        """0 in the first layer, 1 in the last."""
        return self.layer_index / max(self.depth - 1, 1)

    @property
    def left(self) -> float:
        """1 in the first layer, almost 0 in the last."""
        return 1 - self.layer_index / self.depth


@dataclass(frozen=True, kw_only=True)
class HeadArgs(DepthArgs):
    """`heads` of `head_dim`; `norm_eps` is that of the layer norm on each head's output (published: 1e-5 * 8^2)."""

    heads: int
    head_dim: int
    norm_eps: float = 64e-5

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(heads=self.heads, head_dim=self.head_dim)


def token_shift(x: Tensor, ctx: Context, cache: LayerCache | CacheView | None) -> Tensor:
    """The real token before each one of `x [B, T, D]`, zero before the first; the cache keeps the last as `shift`."""
    shape = (x.shape[0], x.shape[2])
    last = x.new_zeros(shape) if cache is None else cache.state("shift", shape, x.dtype, "conv", x.device)
    line = torch.cat([last[:, None], x], 1)
    if ctx.padding_mask is not None:
        line = line.gather(1, _last_real(ctx.padding_mask)[..., None].expand(-1, -1, x.shape[2]))
    if cache is not None:
        cache.put("shift", line[:, -1].clone(), "conv")  # a view would keep all of it
    elif ctx.cu_seqlens is not None:
        return line[:, :-1].masked_fill(_starts(ctx.cu_seqlens, x.shape[1]), 0)
    return line[:, :-1]


def _last_real(mask: Tensor) -> Tensor:
    """`[B, 1 + T]`: in a line of what came before and T tokens, the place of the last real one up to each place."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return F.pad(torch.where(mask, places, 0).cummax(1).values, (1, 0))


def _starts(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """`[T, 1]`, True on the first token of each packed sequence (an empty one at the end starts at T)."""
    starts = torch.zeros(tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
    return starts.index_fill(0, cu_seqlens[:-1].long(), True)[:tokens, None]


def mixed(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """`x` with `share` of the way gone to `other`, per channel."""
    return x + (other - x) * share.to(x.dtype)


class LowRank(nn.Module):
    """`up(inner(down(x))) + offset`, in fp32: a data-dependent vector of `width` through `rank` numbers."""

    def __init__(
        self, inputs: int, rank: int, width: int, inner: Callable[[Tensor], Tensor] | None = None, offset: bool = True
    ) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        if offset:
            self.offset = keep_fp32(nn.Parameter(torch.zeros(width, dtype=torch.float32)))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, inputs] -> [B, T, width]`."""
        y = self.down(x)
        y = wide(self.up(y if self.inner is None else self.inner(y)))
        return y + wide(self.offset) if hasattr(self, "offset") else y


def ramp(width: int) -> Tensor:
    """`[width]`, from 0 to almost 1."""
    return torch.arange(width) / width


def decay_speeds(width: int, low: float, span: float, exponent: float) -> Tensor:
    """`[width]` from `low` to `low + span`, along a power."""
    return low + span * (torch.arange(width) / max(width - 1, 1)) ** exponent


def bonuses(heads: int, head_dim: int, risen: float) -> Tensor:
    """`[H, K]`: the start of the bonus of RWKV-5 and RWKV-6, falling over the channels in deep layers."""
    index = torch.arange(heads * head_dim)
    falling = risen * (1 - index / max(heads * head_dim - 1, 1))
    return (falling + 0.1 * ((index + 1) % 3 - 1)).view(heads, head_dim)
