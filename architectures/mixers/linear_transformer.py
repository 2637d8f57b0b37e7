"""Linear Transformer (Katharopoulos et al. 2020, arXiv 2006.16236): attention with the kernel of `elu(x) + 1`.

    o_t = sum_{s <= t} phi(q_t) phi(k_s)^T v_s / sum_{s <= t} phi(q_t) phi(k_s)^T,   phi(x) = elu(x) + 1

B batch, T new tokens, H heads, K key and V value head dimension.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.features import KernelAttention
from zoo.architectures.core.linear import ProjectionArgs, projection_args
from zoo.architectures.core.mixer import Context, wide
from zoo.architectures.core.plan import AttentionSpec, MixerPlan
from zoo.architectures.core.recurrent import transferred_rows

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24}


class LinearTransformer(KernelAttention):
    options = ProjectionArgs

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        args = projection_args(spec, spec.heads if heads is None else len(heads))
        return MixerPlan(args=args, rows=transferred_rows(spec, heads), inits=())

    def features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        q, k = ((F.elu(wide(x)) + 1).to(x.dtype) for x in (q, k))
        return q, k


MODULE = LinearTransformer
