"""Random feature attention (Peng et al. 2021, arXiv 2103.02143): softmax attention over unit vectors estimated by
random Fourier features, by choice with a gate.

    phi(x) = [sin(w_i y), cos(w_i y)], i = 1 .. M,   y = x / |x|,   w_i = sigma * u_i,   u_i Gaussian
    S_t = S_{t-1} + phi(k_t)^T v_t,   z_t = z_{t-1} + phi(k_t),   o_t = phi(q_t) S_t / (phi(q_t) z_t^T)
    gated:  S_t = g_t S_{t-1} + (1 - g_t) phi(k_t)^T v_t, and z_t likewise,   g_t = sigmoid(x_t w + b)

E[phi(q) phi(k)^T] = M exp(-|sigma * (q - k)|^2 / 2), for unit vectors and sigma = 1 proportional to exp(q k^T).

B batch, T new tokens, H heads, K key and V value head dimension, M random features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.features import KernelAttention
from zoo.architectures.core.linear import ProjectionArgs, check_sizes, projection_args
from zoo.architectures.core.mixer import Context, wide
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan
from zoo.architectures.core.recurrent import transferred_rows

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24, "features": 32}
VARIANTS = {"gated": {**EXAMPLE, "gated": True}}


@dataclass(frozen=True, kw_only=True)
class Args(ProjectionArgs):
    """`features` is M; `seed` draws the u_i, which are stored with the weights; `gated` adds the gate (RFA-Gate).
    sigma is learned, one per channel of a head.
    """

    features: int = 64
    gated: bool = False
    seed: int = 0

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(features=self.features)


class RandomFeatureAttention(KernelAttention):
    options = Args
    directions: Tensor  # the u_i, [H, M, K]

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        self.args, self.feature_dim = args, 2 * args.features
        self.register_buffer("directions", torch.zeros(args.heads, args.features, args.head_dim))
        self.sigma = nn.Parameter(torch.ones(args.heads, args.head_dim))
        if args.gated:
            self.decay_proj = nn.Linear(config.hidden_size, args.heads)

    def init_weights(self, std: float) -> None:
        initialization.ones_(self.sigma)
        initialization.copy_(self.directions, self._draw(self.args.seed))

    def redraw(self, seed: int) -> None:
        """New random directions; a cache that was filled before no longer fits."""
        self.directions.copy_(self._draw(seed))

    def _draw(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.directions.shape, generator=generator, device="cpu")

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        count, d = spec.heads if heads is None else len(heads), spec.head_dim
        inits = (
            Init(target="directions", shape=(count, 64, d), kind="normal", options={"std": 1.0}),
            Init(target="sigma", shape=(count, d), kind="ones"),
        )
        return MixerPlan(
            args=projection_args(spec, count) | {"features": 64}, rows=transferred_rows(spec, heads), inits=inits
        )

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        q, k = self.queries_keys(x, ctx)
        q, k = self._waves(q), self._waves(k)
        decay = None
        if self.args.gated:
            logits = wide(self.decay_proj(x))
            decay = ctx.mask(F.logsigmoid(logits))
            k = k * torch.sigmoid(-logits)[..., None]
        return self.attend(q.to(v.dtype), k.to(v.dtype), v, decay, ctx, cache)

    def _waves(self, x: Tensor) -> Tensor:
        """phi of `x [B, T, H, K]`, `[B, T, H, 2M]`, up to the constant that cancels."""
        scaled = F.normalize(wide(x), dim=-1) * wide(self.sigma)
        phases = torch.einsum("bthk,hmk->bthm", scaled, wide(self.directions))
        return torch.cat([phases.sin(), phases.cos()], dim=-1)


MODULE = RandomFeatureAttention
