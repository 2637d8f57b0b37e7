"""cosFormer (Qin et al. 2022, arXiv 2202.08791): ReLU features, weighed by the cosine of the distance.

    o_t = sum_{s <= t} w_ts v_s / sum_{s <= t} w_ts,   w_ts = relu(q_t) relu(k_s)^T cos(pi/2 (t - s) / M)

The cosine of a difference splits into `[x cos, x sin]` of queries and of keys, so that the sum stays linear. M is
fixed, and part of the function: beyond M tokens of distance the weights are negative.

B batch, T new tokens, H heads, K key and V value head dimension; features have 2K channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.features import KernelAttention, cosine_pair
from zoo.architectures.core.linear import ProjectionArgs, check_sizes, projection_args
from zoo.architectures.core.mixer import Context, wide_dtype
from zoo.architectures.core.plan import AttentionSpec, MixerPlan
from zoo.architectures.core.recurrent import transferred_rows

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24, "max_distance": 256}


@dataclass(frozen=True, kw_only=True)
class Args(ProjectionArgs):
    """`max_distance` is M, in tokens (None: the config's `max_position_embeddings`)."""

    max_distance: int | None = None

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(max_distance=self.max_distance)


class CosFormer(KernelAttention):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        self.max_distance = args.max_distance or config.max_position_embeddings
        self.feature_dim = 2 * self.key_dim

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        args = projection_args(spec, spec.heads if heads is None else len(heads))
        return MixerPlan(args=args | {"max_distance": spec.max_position}, rows=transferred_rows(spec, heads), inits=())

    def features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        angles = ctx.positions[..., None, None].to(wide_dtype(q)) * (math.pi / 2 / self.max_distance)
        return cosine_pair(F.relu(q), angles), cosine_pair(F.relu(k), angles)


MODULE = CosFormer
