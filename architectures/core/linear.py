"""What mixers over the `linear_attention` op share: the projections of attention, and the recurrence over the cache.

B batch, T new tokens, H key heads, Hv value heads, K key and V value head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.cache_view import CacheView
from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.mixer import Context, Mixer, grouped, wide
from zoo.architectures.core.norms import make_norm
from zoo.architectures.core.plan import AttentionSpec
from zoo.architectures.core.recurrent import check_rope, continued
from zoo.architectures.core.rope import apply_rope
from zoo.errors import ZooError
from zoo.kernels.linear_attention import linear_attention, linear_attention_step

# Attention averages values, and an average is small: an output norm that starts at one would be several times too loud.
NORM_START = 0.1


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    ctx: Context,
    cache: LayerCache | CacheView | None,
    *,
    normalize: Literal["sum"] | None = None,
    scale: float | None = None,
    bonus: Tensor | None = None,
    value_decay: Tensor | None = None,
) -> Tensor:
    """`linear_attention` of `q, k [B, T, H, K]` and `v [B, T, Hv, V]`, over the cache's `state`."""
    options: dict[str, Any] = {"normalize": normalize, "scale": scale, "bonus": bonus, "value_decay": value_decay}
    states = {"state": (v.shape[2], q.shape[3], v.shape[3] + (normalize == "sum"))}
    return continued(linear_attention, linear_attention_step, (q, k, v, decay), states, ctx, cache, **options)


def recurrent_bytes(heads: int, keys: int, values: int) -> int:
    """Bytes of a state `[heads, keys, values]` in fp32."""
    return heads * keys * values * torch.float32.itemsize


def decay_rates(heads: int, max_position: int) -> Tensor:
    """Rates, fp64: head h halves its state in 16 to `max_position` tokens, spread evenly in the logarithm."""
    half_lives = torch.logspace(math.log2(16), math.log2(max_position), heads, base=2.0, dtype=torch.float64)
    return math.log(2) / half_lives


def decay_biases(rates: Tensor, divisor: float) -> Tensor:
    """The bias b of each rate, with `logsigmoid(b) / divisor = -rate`."""
    return -torch.log(torch.expm1(divisor * rates))


def group_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis of `x`, in fp32, times `weight` (broadcast); the result has x's dtype."""
    normed = F.rms_norm(wide(x), (x.shape[-1],), eps=eps)
    return (normed * wide(weight)).to(x.dtype)


def norm_start(scales: Tensor, args: Any) -> Tensor:
    """`scales [H]` for the weights of an output norm; for weights that all heads share, their mean."""
    return scales if args.norm_per_head or getattr(args, "norm_full", False) else scales.mean()


def strength_bias(beta: Tensor, args: Any) -> Tensor:
    """The bias under which a sigmoid, times `beta_scale`, is `beta`."""
    return (beta / args.beta_scale).logit()


def check_sizes(**sizes: int | None) -> None:
    """Refuse a size below 1; None stands for a default."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ZooError(f"{name} was {size}; it must be at least 1")


def check_norm(name: str, kind: str | None) -> None:
    """Refuse a norm kind that does not exist; None is no norm."""
    if kind is not None:
        try:
            Norm(kind=kind)
        except ZooError as error:
            raise ZooError(f"{name}: {error}") from None


def check_width(conv: int, activation: str | None) -> None:
    """Refuse a short convolution of negative width or with an unknown activation."""
    if conv < 0:
        raise ZooError(f"conv was {conv}; it must be a width, or 0 for none")
    if activation not in (None, "silu"):
        raise ZooError(f"conv_activation {activation!r} is unknown; it must be silu, or null for none")


@dataclass(frozen=True, kw_only=True)
class ProjectionArgs(mixer.Args):
    """Arguments of a mixer with attention's projections: head sizes (`value_dim` defaults to `head_dim`), and softmax
    attention's biases, `qk_norm` (per head, or over all heads if `qk_norm_full`) and `rope`."""

    heads: int
    head_dim: int
    value_dim: int | None = None
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    qk_norm: str | None = None
    qk_norm_full: bool = False
    qk_norm_eps: float = 1e-6
    rope: str | None = None

    def check(self, config: DecoderConfig) -> None:
        check_sizes(heads=self.heads, head_dim=self.head_dim, value_dim=self.value_dim)
        check_norm("qk_norm", self.qk_norm)
        check_rope(self.rope, config)


def projection_args(spec: AttentionSpec, heads: int) -> dict[str, Any]:
    """`ProjectionArgs` of `heads` heads that take over the attention of `spec`."""
    biases = {"q_bias": spec.q_bias, "k_bias": spec.k_bias, "v_bias": spec.v_bias, "o_bias": spec.o_bias}
    return {"heads": heads, "head_dim": spec.head_dim, **biases, **rotation_args(spec)}


def rotation_args(spec: AttentionSpec) -> dict[str, Any]:
    """The arguments that `RotatedKeys.make_rotation` reads, as in the attention of `spec`."""
    norm = {"qk_norm": spec.qk_norm, "qk_norm_full": bool(spec.args.get("qk_norm_full")), "qk_norm_eps": spec.norm_eps}
    return {**norm, "rope": spec.rope}


class RotatedKeys(Mixer):
    """A mixer whose queries and keys may carry attention's qk-norm and RoPE, so that attention transfers exactly."""

    def make_rotation(self, config: DecoderConfig, args: Any, heads: int, key_dim: int) -> None:
        """Norms `q_norm`, `k_norm` and the rotary pairing, as `args` (qk_norm, qk_norm_full, qk_norm_eps, rope) say."""
        self.rope: str | None = args.rope
        self.pairing = config.ropes[args.rope].pairing if args.rope else "half"
        self.normed, self.normed_whole = args.qk_norm is not None, args.qk_norm_full
        if self.normed:
            norm, width = Norm(kind=args.qk_norm, eps=args.qk_norm_eps), key_dim * (heads if args.qk_norm_full else 1)
            self.q_norm, self.k_norm = make_norm(norm, width), make_norm(norm, width)

    def rotated(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """`q, k [B, T, H, K]` after qk-norm and RoPE."""
        if self.normed and self.normed_whole:
            q, k = (norm(x.flatten(-2)).view_as(x) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        elif self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            table = ctx.ropes[self.rope]
            q, k = apply_rope(q, table, self.pairing), apply_rope(k, table, self.pairing)
        return q, k


class Projected(RotatedKeys):
    """A mixer with attention's own projections q, k, v, o and one head of values per head of keys."""

    heads: int

    def make_projections(self, config: DecoderConfig, args: Any, value_dim: int) -> None:
        """`args` has heads, head_dim, q_bias, k_bias, v_bias, o_bias and what `make_rotation` reads."""
        self.heads, width = args.heads, config.hidden_size
        keys, values = args.heads * args.head_dim, args.heads * value_dim
        self.q_proj = nn.Linear(width, keys, bias=args.q_bias)
        self.k_proj = nn.Linear(width, keys, bias=args.k_bias)
        self.v_proj = nn.Linear(width, values, bias=args.v_bias)
        self.o_proj = nn.Linear(values, width, bias=args.o_bias)
        self.make_rotation(config, args, args.heads, args.head_dim)

    def queries_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys `[B, T, H, K]` after qk-norm and RoPE."""
        q, k = (grouped(projection(x), self.heads) for projection in (self.q_proj, self.k_proj))
        return self.rotated(q, k, ctx)

    def expanded_qkv(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        return *self.queries_keys(x, ctx), grouped(self.v_proj(x), self.heads)
