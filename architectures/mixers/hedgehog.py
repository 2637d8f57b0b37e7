"""Hedgehog (Zhang et al. 2024, arXiv 2402.04347): linear attention with a learned feature map that mimics softmax.

    phi(x) = [softmax(x W), softmax(-x W)]
    o_t = sum_{s <= t} phi(q_t) phi(k_s)^T v_s / sum_{s <= t} phi(q_t) phi(k_s)^T

The form is LoLCATs' (arXiv 2410.10254): one map per head for queries and one for keys, after RoPE.

B batch, T new tokens, H heads, K key and V value head dimension; features have 2K channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.features import KernelAttention
from zoo.architectures.core.linear import ProjectionArgs, projection_args
from zoo.architectures.core.mixer import Context, wide
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan
from zoo.architectures.core.recurrent import transferred_rows

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24, "rope": "default"}


class Hedgehog(KernelAttention):
    options = ProjectionArgs

    def __init__(self, config: DecoderConfig, args: ProjectionArgs) -> None:
        super().__init__(config, args)
        self.feature_dim = 2 * self.key_dim
        shape = (args.heads, args.head_dim, args.head_dim)
        self.q_map, self.k_map = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def init_weights(self, std: float) -> None:
        """The identity map, as published: the parameters hold `W - I`."""
        initialization.zeros_(self.q_map)
        initialization.zeros_(self.k_map)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        count, d = spec.heads if heads is None else len(heads), spec.head_dim
        args = projection_args(spec, count)
        inits = tuple(Init(target=name, shape=(count, d, d), kind="zeros") for name in ("q_map", "k_map"))
        return MixerPlan(args=args, rows=transferred_rows(spec, heads), inits=inits)

    def features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return features(q, self.q_map), features(k, self.k_map)


def features(x: Tensor, weight: Tensor) -> Tensor:
    """`x [B, T, H, K] -> [B, T, H, 2K]`, positive, each half summing to one; `weight [H, K, K]` is `W - I`."""
    mapped = wide(x + torch.einsum("bthk,hkf->bthf", x, weight.to(x.dtype)))
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1).to(x.dtype)


MODULE = Hedgehog
