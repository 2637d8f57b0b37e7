"""What mixers with kernels and fixed decays share: normalised attention over features, and how features are made.

B batch, T new tokens, H heads, K key and V value head dimension, F features of a key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.cache_view import CacheView
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import Projected, ProjectionArgs, recur, recurrent_bytes
from zoo.architectures.core.mixer import Context, grouped, wide


class KernelAttention(Projected):
    """Attention with a kernel in place of the exponential, `phi(q_t) S_t / (phi(q_t) z_t)`.

    A subclass defines `features`, and sets `feature_dim` when it is not that of keys.
    """

    def __init__(self, config: DecoderConfig, args: ProjectionArgs) -> None:
        super().__init__()
        self.key_dim, self.value_dim = args.head_dim, args.value_dim or args.head_dim
        self.feature_dim = self.key_dim
        self.make_projections(config, args, self.value_dim)

    def features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Features `[B, T, H, F]` of `q, k [B, T, H, K]`."""
        raise TypeError(f"{type(self).__name__} must define features")

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        o = self.mix_values(x, grouped(self.v_proj(x), self.heads), ctx, cache)
        return self.o_proj(o.to(x.dtype).flatten(-2))

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        return self.attend(*self.features(*self.queries_keys(x, ctx), ctx), v, None, ctx, cache)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, ctx: Context, cache: LayerCache | None
    ) -> Tensor:
        """Features `q, k` over values `v`, with a log decay if any: `[B, T, H, V]`."""
        # masked after the map: the features of a zero vector are not zero
        return recur(q, ctx.mask(k), ctx.mask(v), decay, ctx, cache, normalize="sum", scale=1.0)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.feature_dim, self.value_dim + 1)


def fixed_decay(rates: Tensor, q: Tensor, ctx: Context) -> Tensor:
    """Log decays `rates [H]` of the tokens of `q [B, T, H, K]`: `[H]`, or `[B, T, H]` where padding does not forget."""
    return rates if ctx.padding_mask is None else ctx.mask(rates.expand(q.shape[:3]))


def cosine_pair(x: Tensor, angles: Tensor) -> Tensor:
    """`[x cos, x sin]`, `[B, T, H, 2K]`, of `x [B, T, H, K]`: the product of two weighs each channel by the cosine of
    the difference of their `angles` (fp32, broadcast to x)."""
    y = wide(x)
    return torch.cat([y * angles.cos(), y * angles.sin()], dim=-1).to(x.dtype)


def running_peak(logits: Tensor, ctx: Context, cache: LayerCache | CacheView | None = None) -> tuple[Tensor, Tensor]:
    """The largest of `logits [B, T, ...]` at or before each token, and the log decay from one such peak to the next.

    Writing `exp(logits - peak)` under that decay is writing `exp(logits)`, but for a scale that the reader divides out
    and that no later token moves. So neither has a gradient. Of packed rows earlier sequences count, which changes the
    scale alone.
    """
    own = logits.detach()
    seen = own if ctx.padding_mask is None else own.masked_fill(~real(ctx, own), -torch.inf)
    shape = (own.shape[0], *own.shape[2:])
    if cache is None:
        before = own.new_full(shape, -torch.inf)
    else:
        before = cache.state("peak", shape, own.dtype, "recurrent", own.device, fill=-torch.inf)
    peaks = torch.cat([before[:, None], seen], dim=1).cummax(dim=1).values
    if cache is not None:
        cache.put("peak", peaks[:, -1])
    last, peak = peaks[:, :-1], peaks[:, 1:]
    decay = torch.where(last.isinf(), 0, last - peak)  # nothing was written yet: nothing to rescale
    return torch.where(peak.isinf(), own, peak), decay


def real(ctx: Context, x: Tensor) -> Tensor:
    """The padding mask, `[B, T, 1, ...]` beside `x [B, T, ...]`."""
    assert ctx.padding_mask is not None
    return ctx.padding_mask.view(*ctx.padding_mask.shape, *[1] * (x.dim() - 2))
