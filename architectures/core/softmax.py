"""What softmax mixers share: projections, norms and rotation of queries and keys, the output gate.

A mixer defines `visible` (which keys it keeps) and `attend` (which of them a query sees).

B batch, T new tokens, S keys, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import UNWEIGHTED, DecoderConfig, Norm
from zoo.architectures.core.keys import Keys, all_tokens, recent_tokens
from zoo.architectures.core.mixer import Context, Mixer, Output, grouped, repeat_heads
from zoo.architectures.core.norms import make_norm
from zoo.architectures.core.plan import AttentionSpec, Row
from zoo.architectures.core.recurrent import check_rope
from zoo.architectures.core.rope import apply_rope
from zoo.errors import ZooError
from zoo.kernels.attention import attention


@dataclass(frozen=True, kw_only=True)
class SoftmaxArgs(mixer.Args):
    """The options of queries, keys and values.

    `qk_norm` is a norm kind, per head or over all heads (`qk_norm_full`), before RoPE unless `qk_norm_after_rope`.
    `temperature = (floor, scale)` multiplies the query at position p by `1 + scale * log(1 + floor((p + 1) / floor))`
    (Llama 4). `scale` defaults to `head_dim ** -0.5`, the values' `value_dim` to `head_dim`.
    """

    heads: int
    head_dim: int
    kv_heads: int | None = None
    value_dim: int | None = None
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    qk_norm: str | None = None
    qk_norm_full: bool = False
    qk_norm_after_rope: bool = False
    qk_norm_eps: float = 1e-6
    rope: str | None = None
    scale: float | None = None
    softcap: float | None = None
    output_gate: bool = False
    temperature: tuple[float, float] | None = None

    def check(self, config: DecoderConfig) -> None:
        kv_heads = self.kv_heads or self.heads
        if self.heads <= 0 or kv_heads <= 0 or self.heads % kv_heads:
            raise ZooError(f"heads was {self.heads} with kv_heads {kv_heads}; heads must be a multiple of kv_heads")
        if self.value_dim is not None and (self.value_dim < 1 or self.output_gate):
            raise ZooError(f"value_dim was {self.value_dim}; it must be at least 1, and without an output_gate")
        check_rope(self.rope, config)


class SoftmaxAttention(Mixer):
    options: ClassVar[type[mixer.Args]] = SoftmaxArgs
    by_head = False
    bidirectional = True
    makes_keys: ClassVar[bool] = True

    def __init__(self, config: DecoderConfig, args: Any) -> None:
        super().__init__()
        self.args = args
        self.heads, self.kv_heads, self.head_dim = args.heads, args.kv_heads or args.heads, args.head_dim
        self.value_dim = args.value_dim or args.head_dim
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        gate = 2 if args.output_gate else 1
        self.q_proj = nn.Linear(config.hidden_size, gate * q_width, bias=args.q_bias)
        if self.makes_keys:
            self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=args.k_bias)
            self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.value_dim, bias=args.v_bias)
        self.o_proj = nn.Linear(self.heads * self.value_dim, config.hidden_size, bias=args.o_bias)
        self.pairing = config.ropes[args.rope].pairing if args.rope else "half"
        if args.qk_norm is not None:
            norm = Norm(kind=args.qk_norm, eps=args.qk_norm_eps)
            self.q_norm = make_norm(norm, q_width if args.qk_norm_full else self.head_dim)
            if self.makes_keys:
                self.k_norm = make_norm(norm, kv_width if args.qk_norm_full else self.head_dim)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"rope": "default"}

    def queries(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """`x [B, T, D]` to queries `[B, T, H, K]` and the logits of the output gate `[B, T, H K]`, if there is one."""
        q, gate = self.plain_queries(x)
        return self.rotated_queries(q, ctx), gate

    def keys_values(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """`x [B, T, D]` to keys and values `[B, T, G, K]` of the new tokens."""
        return self.rotated(self.plain_keys(x), "k_norm", ctx), grouped(self.v_proj(x), self.kv_heads)

    def plain_queries(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries `[B, T, H, K]` before RoPE, and the logits of the output gate."""
        q, gate = self.q_proj(x), None
        if self.args.output_gate:
            q, gate = (part.flatten(-2) for part in grouped(q, self.heads).chunk(2, dim=-1))
        return self._normed(q, "q_norm", self.heads), gate

    def rotated_queries(self, q: Tensor, ctx: Context) -> Tensor:
        """Queries `[B, T, H, K]` from those before RoPE."""
        q = self.rotated(q, "q_norm", ctx)
        if self.args.temperature is not None:
            floor, scale = self.args.temperature
            steps = torch.log1p(torch.floor((ctx.positions.float() + 1.0) / floor)) * scale + 1.0
            q = q * steps[..., None, None].to(q.dtype)
        return q

    def plain_keys(self, x: Tensor) -> Tensor:
        """Keys `[B, T, G, K]` before RoPE."""
        return self._normed(self.k_proj(x), "k_norm", self.kv_heads)

    def _normed(self, x: Tensor, name: str, heads: int) -> Tensor:
        """`[B, T, heads K]` to `[B, T, heads, K]` after the qk-norm that stands before RoPE."""
        if self.args.qk_norm is None or (self.args.qk_norm_after_rope and not self.args.qk_norm_full):
            return grouped(x, heads)
        norm = getattr(self, name)
        return grouped(norm(x), heads) if self.args.qk_norm_full else norm(grouped(x, heads))

    def rotated(self, x: Tensor, name: str, ctx: Context) -> Tensor:
        """`[B, T, heads, K]` after RoPE and the qk-norm `name`, where that stands after it."""
        if self.args.rope is not None:
            x = apply_rope(x, ctx.ropes[self.args.rope], self.pairing)
        after = self.args.qk_norm is not None and self.args.qk_norm_after_rope and not self.args.qk_norm_full
        return getattr(self, name)(x) if after else x

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Output:
        """`x [B, T, D] -> [B, T, D]`, and what the mixer writes for later layers."""
        q, gate = self.queries(x, ctx)
        keys = self.visible(x, ctx, cache)
        o = self.attend(q, keys, ctx).flatten(-2)
        y = self.o_proj(o if gate is None else o * torch.sigmoid(gate))
        written = self.written(keys)
        return (y, written) if written else y

    @property
    def recent(self) -> int | None:
        """How many of the last tokens later queries can see; None: all of them."""
        return None

    def visible(self, x: Tensor, ctx: Context, cache: LayerCache | None) -> Keys:
        """The keys and values that the queries of `x [B, T, D]` may see, or more."""
        new = dict(zip("kv", self.keys_values(x, ctx), strict=True))
        if cache is not None and self.recent is not None:
            seen, q_at, k_at = recent_tokens(new, ctx, cache, self.recent, getattr(self.args, "sinks", 0))
        else:
            seen, q_at, k_at = all_tokens(new, ctx, cache)
        return Keys(seen["k"], seen["v"], q_at, k_at)

    def attend(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        """`[B, T, H, K]`: each query's average of the values that it sees."""
        o: Tensor = attention(q, keys.k, keys.v, **self.call(keys, ctx))
        return o

    def call(self, keys: Keys, ctx: Context) -> dict[str, Any]:
        """The arguments of the op that do not depend on the pattern."""
        return dict(
            causal=ctx.causal,
            q_positions=keys.q_positions,
            k_positions=keys.k_positions,
            softcap=self.args.softcap,
            scale=self.args.scale,
            cu_seqlens=ctx.cu_seqlens,
            backend="eager" if ctx.eager else None,
        )

    def written(self, keys: Keys) -> dict[str, Tensor]:
        """Values for later layers."""
        return {}

    def expanded_qkv(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        group = self.heads // self.kv_heads
        k, v = self.keys_values(x, ctx)
        return self.queries(x, ctx)[0], repeat_heads(k, group), repeat_heads(v, group)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        token = self.kv_heads * (self.head_dim + self.value_dim) * itemsize
        if self.recent is None:
            return token * length
        return (self.recent + getattr(self.args, "sinks", 0)) * (token + torch.int64.itemsize)


def attention_rows(spec: AttentionSpec) -> tuple[Row, ...]:
    """The tensors of softmax attention that a mixer with the same projections takes over as they are."""
    biased = {"q_proj": spec.q_bias, "k_proj": spec.k_bias, "v_proj": spec.v_bias, "o_proj": spec.o_bias}
    names = [f"{name}.weight" for name in biased]
    names += [f"{name}.bias" for name, present in biased.items() if present]
    names += ["q_norm.weight", "k_norm.weight"] if spec.qk_norm not in (None, *UNWEIGHTED) else []
    return tuple(Row(source=name, target=name) for name in names)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax over the keys of all parts, from each part's `(o [B, T, H, V], lse [B, T, H])`.

    A part in which a query sees nothing (lse = -inf) counts nothing; a query that sees nothing at all gets 0.
    """
    lse = torch.stack([part for _, part in parts])
    weights = (lse - lse.amax(0).clamp(min=torch.finfo(lse.dtype).min)).exp()
    weights = weights / weights.sum(0).clamp(min=torch.finfo(lse.dtype).tiny)
    o = torch.stack([part for part, _ in parts])
    return (o * weights[..., None]).sum(0).to(o.dtype)


def known_positions(q: Tensor, keys: Keys, ctx: Context) -> tuple[Tensor, Tensor]:
    """Positions of the queries `[T]` or `[B, T]` and of the keys `[S]` or `[B, S]`, also where their order tells."""
    if keys.k_positions is not None and keys.q_positions is not None:
        return keys.q_positions, keys.k_positions
    if ctx.cu_seqlens is not None:
        return ctx.positions, ctx.positions
    positions = torch.arange(keys.k.shape[1], device=q.device)
    return positions[positions.shape[0] - q.shape[1] :], positions
