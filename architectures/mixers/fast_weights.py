"""Fast weight programmers (Schlag et al. 2021, arXiv 2102.11174): a network that writes the weights of another one.

    delta   S_t = S_{t-1} + phi(k_t)^T beta_t (v_t - phi(k_t) S_{t-1}),   o_t = phi(q_t) S_t,   beta_t = sigmoid(x_t W)
    sum     S_t = S_{t-1} + phi(k_t)^T v_t,   o_t = phi(q_t) S_t / (phi(q_t) z_t),   z_t = z_{t-1} + phi(k_t)

phi is DPFP, the products of neighbours among r = relu([x, -x]):  phi(x)_(i, j) = r_j r_{j - i},  i = 1 .. nu, indices
around the end; under the delta rule it is divided by its sum.

B batch, T new tokens, H heads, K key and V value head dimension, F = 2 nu K features of a key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architectures.core import delta
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.features import KernelAttention
from zoo.architectures.core.linear import ProjectionArgs, projection_args, recurrent_bytes
from zoo.architectures.core.mixer import Context, wide
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan
from zoo.architectures.core.recurrent import transferred_rows
from zoo.errors import ZooError

EXAMPLE = {"heads": 2, "head_dim": 8, "value_dim": 24, "nu": 2}
VARIANTS = {"sum": {**EXAMPLE, "rule": "sum", "nu": 1}}
RULES = ("delta", "sum")
SMALLEST = 1e-6  # a sum of features is taken to be at least this


@dataclass(frozen=True, kw_only=True)
class Args(ProjectionArgs):
    """`rule` is one of those above; `nu` is how many neighbours DPFP pairs each channel with."""

    rule: str = "delta"
    nu: int = 1

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        if self.rule not in RULES:
            raise ZooError(f"rule {self.rule!r} is unknown; it must be one of {', '.join(RULES)}")
        if not 1 <= self.nu < 2 * self.head_dim:
            raise ZooError(f"nu was {self.nu}; it must be from 1 to {2 * self.head_dim - 1} (2 head_dim - 1)")


class FastWeights(KernelAttention):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        self.args, self.feature_dim = args, 2 * args.nu * args.head_dim
        if args.rule == "delta":
            self.b_proj = nn.Linear(config.hidden_size, args.heads, bias=False)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        count = spec.heads if heads is None else len(heads)
        strength = Init(target="b_proj.weight", shape=(count, spec.hidden_size), kind="zeros")
        return MixerPlan(args=projection_args(spec, count), rows=transferred_rows(spec, heads), inits=(strength,))

    def features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return dpfp(wide(q), self.args.nu).to(q.dtype), dpfp(wide(k), self.args.nu).to(k.dtype)

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        if self.args.rule == "sum":
            return super().mix_values(x, v, ctx, cache)
        q, k = self.queries_keys(x, ctx)
        q, k = (shares(dpfp(wide(part), self.args.nu)).to(x.dtype) for part in (q, k))
        beta = ctx.mask(wide(self.b_proj(x)).sigmoid())
        return delta.recur(q, ctx.mask(k), ctx.mask(v), beta, None, ctx, cache, qk_l2norm=False, scale=1.0)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.feature_dim, self.value_dim + (self.args.rule == "sum"))


def dpfp(x: Tensor, nu: int) -> Tensor:
    """`x [..., K] -> [..., 2 nu K]`, none negative."""
    r = F.relu(torch.cat([x, -x], dim=-1))
    return torch.cat([r * r.roll(i, dims=-1) for i in range(1, nu + 1)], dim=-1)


def shares(features: Tensor) -> Tensor:
    """Features divided by their sum."""
    return features / features.sum(-1, keepdim=True).clamp(min=SMALLEST)


MODULE = FastWeights
