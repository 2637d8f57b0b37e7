"""Luna (Ma et al. 2021, arXiv 2106.01540): attention through a pool of P memory vectors.

    Y = softmax(pool K^T) V   (pack: the pool reads the text),   o_t = softmax(q_t (Y W_k)^T) (Y W_v)   (unpack)

The next layer's pool is the layer norm of pool + Y; the first layer's is learned. The pool has read the whole text, so
that no token can be predicted: it is for encoders.

B batch, T tokens, P memory vectors, D hidden size, H heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import key_positions
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer, grouped
from zoo.errors import ZooError
from zoo.kernels.attention import attention

POOL = "luna_pool"
BEFORE = (("luna", {"heads": 4, "head_dim": 16, "pool": 6}),)
EXAMPLE = {"heads": 4, "head_dim": 16}
VARIANTS = {"bias": {**EXAMPLE, "bias": True}, "pool": {**EXAMPLE, "pool": 5}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`pool` is the number of memory vectors, which the first layer owns; without it a layer reads those of the layer
    before."""

    heads: int
    head_dim: int
    pool: int | None = None
    bias: bool = False
    norm_eps: float = 1e-5

    def check(self, config: DecoderConfig) -> None:
        check_sizes(heads=self.heads, head_dim=self.head_dim, pool=self.pool)
        if self.heads * self.head_dim != config.hidden_size:
            width = self.heads * self.head_dim
            raise ZooError(f"heads times head_dim was {width}; it must be hidden_size ({config.hidden_size})")


class Luna(Mixer):
    options = Args
    encoder_only = True
    packed = False
    writes = (POOL,)

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.heads, width = args, args.heads, config.hidden_size
        for name in ("pool_q", "pool_k", "pool_v", "q", "k", "v", "o"):
            self.add_module(f"{name}_proj", nn.Linear(width, width, bias=args.bias))
        if args.pool is None:
            self.pool_norm = nn.LayerNorm(width, eps=args.norm_eps)
        else:
            self.pool = nn.Parameter(torch.zeros(args.pool, width))

    def init_weights(self, std: float) -> None:
        if self.args.pool is not None:
            initialization.normal_(self.pool, mean=0.0, std=self.pool.shape[1] ** -0.5)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"pool": 16}

    @classmethod
    def reads_of(cls, args: Args) -> tuple[str, ...]:
        return (POOL,) if args.pool is None else ()

    def forward(self, x: Tensor, ctx: Context, cache: object = None) -> tuple[Tensor, dict[str, Tensor]]:
        """`x [B, T, D] -> [B, T, D]`, and the pool `[B, P, D]` for the next layer, before its norm."""
        pool = self._pool(x, ctx)
        positions = None if ctx.padding_mask is None else key_positions(ctx)
        read = self._attend("pool_", pool, x, positions, ctx)
        return self.get_submodule("o_proj")(self._attend("", x, read, None, ctx)), {POOL: pool + read}

    def _pool(self, x: Tensor, ctx: Context) -> Tensor:
        if self.args.pool is not None:
            return self.pool.to(x.dtype).expand(x.shape[0], -1, -1)
        pool: Tensor = self.get_submodule("pool_norm")(ctx.values[POOL])
        return pool

    def _attend(self, prefix: str, queries: Tensor, source: Tensor, positions: Tensor | None, ctx: Context) -> Tensor:
        """All of `source [B, S, D]`, but for keys out of sight at `positions`, read by `queries [B, N, D]`."""
        given = {"q": queries, "k": source, "v": source}
        q, k, v = (grouped(self.get_submodule(f"{prefix}{n}_proj")(x), self.heads) for n, x in given.items())
        backend = "eager" if ctx.eager else None
        return attention(q, k, v, causal=False, k_positions=positions, backend=backend).flatten(-2)


MODULE = Luna
