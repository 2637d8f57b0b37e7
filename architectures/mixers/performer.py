"""Performer (Choromanski et al. 2020, arXiv 2009.14794): softmax attention estimated by positive random features
(FAVOR+).

    o_t = sum_{s <= t} phi(q_t) phi(k_s)^T v_s / sum_{s <= t} phi(q_t) phi(k_s)^T
    phi(x) = exp(w_i y - |y|^2 / 2), i = 1 .. M,   y = x / K^(1/4),   so that E[phi(q) phi(k)^T] = M exp(q k^T / K^0.5)

The w_i are Gaussian and orthogonal in blocks of K. The exponents are kept in range by a maximum that no later token
can move: that of the query, and the running one m_t of the keys, which enters as the decay exp(m_{t-1} - m_t).

B batch, T new tokens, H heads, K key and V value head dimension, M random features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.features import KernelAttention, running_peak
from zoo.architectures.core.linear import ProjectionArgs, check_sizes, projection_args
from zoo.architectures.core.mixer import Context, wide
from zoo.architectures.core.operations import orthogonal_features
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan
from zoo.architectures.core.recurrent import transferred_rows

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24, "features": 40}
FLOOR = 1e-4  # on the features of a query, so that no query misses every key


@dataclass(frozen=True, kw_only=True)
class Args(ProjectionArgs):
    """`features` is M; `seed` draws the random directions, which are stored with the weights."""

    features: int = 256
    seed: int = 0

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(features=self.features)


class Performer(KernelAttention):
    options = Args
    directions: Tensor  # the w_i, [M, K]

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        self.seed, self.feature_dim = args.seed, args.features
        self.register_buffer("directions", torch.zeros(args.features, args.head_dim))

    def init_weights(self, std: float) -> None:
        initialization.copy_(self.directions, self._draw(self.seed))

    def redraw(self, seed: int) -> None:
        """New random directions; a cache that was filled before no longer fits."""
        self.directions.copy_(self._draw(seed))

    def _draw(self, seed: int) -> Tensor:
        return orthogonal_features((self.feature_dim, self.key_dim), torch.Generator().manual_seed(seed))

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        args = projection_args(spec, spec.heads if heads is None else len(heads)) | {"features": 256}
        draw = Init(target="directions", shape=(256, spec.head_dim), kind="orthogonal_features")
        return MixerPlan(args=args, rows=transferred_rows(spec, heads), inits=(draw,))

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        q, k = self.queries_keys(x, ctx)
        q_logits, k_logits = self._exponents(q), self._exponents(k)
        peak, decay = running_peak(k_logits.amax(-1), ctx, cache)
        q = (q_logits - q_logits.amax(-1, keepdim=True)).exp() + FLOOR
        k = (k_logits - peak[..., None]).exp()
        return self.attend(q.to(v.dtype), k.to(v.dtype), v, decay, ctx, cache)

    def _exponents(self, x: Tensor) -> Tensor:
        """`log phi(x)`, `[B, T, H, M]`, of `x [B, T, H, K]`."""
        y = wide(x) * self.key_dim**-0.25
        return y @ wide(self.directions).T - y.square().sum(-1, keepdim=True) / 2

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return super().state_bytes(length, itemsize) + self.heads * torch.float32.itemsize


MODULE = Performer
