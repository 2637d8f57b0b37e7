"""Softmax attention: multi-head, grouped-query (Ainslie et al. 2023, arXiv 2305.13245), full, windowed or chunked.

B batch, T new tokens, S keys, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import UNSEEN, LayerCache
from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.mixer import Context, Mixer, grouped, repeat_heads, wide
from zoo.architectures.core.norms import make_norm
from zoo.architectures.core.plan import AttentionSpec, MixerPlan, Row
from zoo.architectures.core.rope import apply_rope
from zoo.errors import ZooError
from zoo.kernels.attention import attention

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"}
VARIANTS = {
    "window": {**EXAMPLE, "window": 4},
    "sinks": {**EXAMPLE, "window": 4, "sinks": 2, "qk_norm": "rms"},
    "chunk": {**EXAMPLE, "chunk": 4},
    "gated": {**EXAMPLE, "output_gate": True, "sink_logits": True, "softcap": 5.0, "temperature": (4.0, 0.5)},
}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """The closed list of options of softmax attention.

    `window` counts keys including the query's own; `sinks` leading tokens stay visible beside it; `chunk` attends
    within blocks of that many tokens. `qk_norm` is a norm kind, per head or over all heads (`qk_norm_full`), before
    RoPE unless `qk_norm_after_rope`. `temperature = (floor, scale)` multiplies the query at position p by
    `1 + scale * log(1 + floor((p + 1) / floor))` (Llama 4). `scale` defaults to `head_dim ** -0.5`.
    """

    heads: int
    head_dim: int
    kv_heads: int | None = None
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    qk_norm: str | None = None
    qk_norm_full: bool = False
    qk_norm_after_rope: bool = False
    qk_norm_eps: float = 1e-6
    rope: str | None = None
    window: int | None = None
    sinks: int = 0
    chunk: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sink_logits: bool = False
    output_gate: bool = False
    temperature: tuple[float, float] | None = None

    def check(self, config: DecoderConfig) -> None:
        kv_heads = self.kv_heads or self.heads
        if self.heads <= 0 or kv_heads <= 0 or self.heads % kv_heads:
            raise ZooError(f"heads was {self.heads} with kv_heads {kv_heads}; heads must be a multiple of kv_heads")
        if self.rope is not None and self.rope not in config.ropes:
            raise ZooError(f"rope {self.rope!r} names no table; the config has {sorted(config.ropes) or 'none'}")
        for name in ("window", "chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ZooError(f"{name} was {value}; it must be at least 1")
        if self.window is not None and self.chunk is not None:
            raise ZooError("window and chunk were both given; choose one")
        if self.sinks and self.window is None:
            raise ZooError(f"sinks was {self.sinks} without a window; sinks only matter beside one")


class Attention(Mixer):
    options = Args
    by_head = False

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args = args
        self.heads, self.kv_heads, self.head_dim = args.heads, args.kv_heads or args.heads, args.head_dim
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        gate = 2 if args.output_gate else 1
        self.q_proj = nn.Linear(config.hidden_size, gate * q_width, bias=args.q_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=args.k_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=args.v_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=args.o_bias)
        self.pairing = config.ropes[args.rope].pairing if args.rope else "half"
        if args.qk_norm is not None:
            norm = Norm(kind=args.qk_norm, eps=args.qk_norm_eps)
            self.q_norm = make_norm(norm, q_width if args.qk_norm_full else self.head_dim)
            self.k_norm = make_norm(norm, kv_width if args.qk_norm_full else self.head_dim)
        if args.sink_logits:
            self.sinks = nn.Parameter(torch.zeros(self.heads))

    def init_weights(self, std: float) -> None:
        if self.args.sink_logits:
            initialization.zeros_(self.sinks)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"rope": "default"}

    @classmethod
    def layer_type_of(cls, args: Mapping[str, Any]) -> str:
        return "sliding_attention" if args.get("window") else "full_attention"

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        if heads is not None:
            raise ZooError("mixer 'attention' keeps all heads of a layer; heads cannot be chosen")
        biased = {"q_proj": spec.q_bias, "k_proj": spec.k_bias, "v_proj": spec.v_bias, "o_proj": spec.o_bias}
        names = [f"{name}.weight" for name in biased]
        names += [f"{name}.bias" for name, present in biased.items() if present]
        names += ["q_norm.weight", "k_norm.weight"] if spec.qk_norm not in (None, "l2") else []
        names += ["sinks"] if spec.args.get("sink_logits") else []
        return MixerPlan(args=dict(spec.args), rows=tuple(Row(source=n, target=n) for n in names), inits=())

    def _qkv(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, gate = self.q_proj(x), None
        if self.args.output_gate:
            q, gate = (part.flatten(-2) for part in grouped(q, self.heads).chunk(2, dim=-1))
        q, k = self._normed(q, self.k_proj(x), ctx)
        return q, k, grouped(self.v_proj(x), self.kv_heads), gate

    def _normed(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        full, after = self.args.qk_norm_full, self.args.qk_norm_after_rope
        if self.args.qk_norm and full:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = grouped(q, self.heads), grouped(k, self.kv_heads)
        if self.args.qk_norm and not full and not after:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.args.rope is not None:
            table = ctx.ropes[self.args.rope]
            q, k = apply_rope(q, table, self.pairing), apply_rope(k, table, self.pairing)
        if self.args.qk_norm and not full and after:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.args.temperature is not None:
            floor, scale = self.args.temperature
            steps = torch.log1p(torch.floor((ctx.positions.float() + 1.0) / floor)) * scale + 1.0
            q = q * steps[..., None, None].to(q.dtype)
        return q, k

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        q, k, v, gate = self._qkv(x, ctx)
        k, v, q_positions, k_positions = self._visible(k, v, ctx, cache)
        o = attention(
            q,
            k,
            v,
            causal=ctx.causal,
            window=self.args.window,
            sink_tokens=self.args.sinks,
            sink_logits=wide(self.sinks) if self.args.sink_logits else None,
            chunk=self.args.chunk,
            q_positions=q_positions,
            k_positions=k_positions,
            softcap=self.args.softcap,
            scale=self.args.scale,
            cu_seqlens=ctx.cu_seqlens,
            backend="eager" if ctx.eager else None,
        ).flatten(-2)
        return self.o_proj(o if gate is None else o * torch.sigmoid(gate))

    def _visible(
        self, k: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """All keys and values, and positions where their order alone does not tell what is visible."""
        new = key_positions(ctx)
        if cache is None:
            return k, v, *((None, None) if ctx.padding_mask is None else (ctx.positions, new))
        if (local := self.args.window or self.args.chunk) is not None:
            return self._ring(k, v, new, ctx, cache, local)
        old = cache.get("k")
        k, v = cache.append("k", k), cache.append("v", v)
        if not cache.static and not cache.padded:
            return k, v, None, None
        if old is not None and cache.get("positions") is None:
            cache.append("positions", torch.arange(old.shape[1], device=k.device).expand(old.shape[:2]))
        return k, v, ctx.positions, cache.append("positions", new, fill=UNSEEN)

    def _ring(
        self, k: Tensor, v: Tensor, new: Tensor, ctx: Context, cache: LayerCache, local: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        fresh = not cache.started and not cache.static and ctx.padding_mask is None
        seen = {"k": k, "v": v, "positions": new}
        held = {}
        for name, x in seen.items():
            fill = UNSEEN if name == "positions" else 0
            shape = (x.shape[0], local - 1 + self.args.sinks, *x.shape[2:])
            old = cache.state(name, shape, x.dtype, "ring", x.device, fill)
            held[name] = torch.cat([old, x], dim=1)
        for name, kept in keep_ring(held, self.args.sinks, local - 1).items():
            cache.put(name, kept, "ring")
        return (k, v, None, None) if fresh else (held["k"], held["v"], ctx.positions, held["positions"])

    def expanded_qkv(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _ = self._qkv(x, ctx)
        group = self.heads // self.kv_heads
        return q, repeat_heads(k, group), repeat_heads(v, group)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        token = 2 * self.kv_heads * self.head_dim * itemsize
        local = self.args.window or self.args.chunk
        if local is None:
            return token * length
        return (local - 1 + self.args.sinks) * (token + torch.int64.itemsize)


def key_positions(ctx: Context) -> Tensor:
    """`[B, T]` positions of the new keys; padding gets one that no query sees."""
    if ctx.padding_mask is None:
        return ctx.positions
    return torch.where(ctx.padding_mask, ctx.positions, UNSEEN)


def keep_ring(held: dict[str, Tensor], sinks: int, recent: int) -> dict[str, Tensor]:
    """What a windowed layer keeps: the keys at positions below `sinks`, each in its slot, then the `recent` last ones.

    `held` has old sinks, old recent and new tokens, in this order, along dim 1.
    """
    total = held["positions"].shape[1]
    last = {name: x[:, total - recent :] for name, x in held.items()}
    if not sinks:
        return last
    slots = torch.arange(sinks, device=held["positions"].device)
    match = held["positions"][:, None, :] == slots[None, :, None]  # [B, sinks, S]
    still_recent = (last["positions"][:, None, :] == slots[None, :, None]).any(-1)
    index, found = match.int().argmax(-1), match.any(-1) & ~still_recent  # a key is held once
    kept = {}
    for name, x in held.items():
        shape = (*index.shape, *[1] * (x.dim() - 2))
        chosen = torch.gather(x, 1, index.view(shape).expand(*index.shape, *x.shape[2:]))
        missing = UNSEEN if name == "positions" else 0
        kept[name] = torch.cat([chosen.masked_fill(~found.view(shape), missing), last[name]], dim=1)
    return kept


MODULE = Attention
