"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434): keys and values from one latent vector per token.

    c_t = rms(x_t D),   [k_t^h, v_t^h] = c_t U^h,   r_t = rope(x_t R)   (one for all heads)
    score of query i for key j in head h = scale (q_i^h . k_j^h + rope(p_i^h) . r_j)

The cache keeps c and r. A decoded token never expands them: with U^h = [K^h, V^h], q . (c K) = (q K^T) . c and the
weighted mean of (c V) is (the weighted mean of c) V, so that all heads attend to one key [c, r] with value c.

B batch, T new tokens, S keys, H heads, N channels of k^h, P rotated channels, V value head dimension, C latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.keys import all_tokens
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer, grouped
from zoo.architectures.core.norms import make_norm
from zoo.architectures.core.recurrent import check_rope
from zoo.architectures.core.rope import apply_rope
from zoo.errors import ZooError
from zoo.kernels.attention import attention

EXAMPLE = {"heads": 4, "nope_dim": 12, "rope_dim": 16, "value_dim": 20, "kv_rank": 24, "rope": "default"}
VARIANTS = {
    "low_rank": {**EXAMPLE, "q_rank": 24, "bias": True, "scale": 0.3},
    "nope": {**EXAMPLE, "rope": None},
    "expanded": {**EXAMPLE, "absorb": False},
}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """Sizes as in the shape legend: `nope_dim` is N, `rope_dim` P, `value_dim` V and `kv_rank` C.

    `q_rank` makes queries from a normalised vector of that size (None: straight from x); `rope` names the table, of
    `rope_dim` channels, that turns r and p (None: no positions); `bias` puts one on the projections from x to the
    latents and on the output; `scale` defaults to `(nope_dim + rope_dim) ** -0.5`; `absorb` decodes without expanding
    the cache.
    """

    heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    kv_rank: int
    q_rank: int | None = None
    rope: str | None = None
    bias: bool = False
    norm_eps: float = 1e-6
    scale: float | None = None
    absorb: bool = True

    def check(self, config: DecoderConfig) -> None:
        sizes = ("heads", "nope_dim", "rope_dim", "value_dim", "kv_rank", "q_rank")
        check_sizes(**{name: getattr(self, name) for name in sizes})
        check_rope(self.rope, config)
        if self.rope is not None and config.ropes[self.rope].dim != self.rope_dim:
            raise ZooError(
                f"rope {self.rope!r} turns {config.ropes[self.rope].dim} channels; rope_dim is {self.rope_dim}"
            )


class LatentAttention(Mixer):
    options = Args
    layer_type = "full_attention"
    bidirectional = True

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, width, norm = args, config.hidden_size, Norm(eps=args.norm_eps)
        queries = args.heads * (args.nope_dim + args.rope_dim)
        if args.q_rank is None:
            self.q_proj = nn.Linear(width, queries, bias=False)
        else:
            self.q_down = nn.Linear(width, args.q_rank, bias=args.bias)
            self.q_norm = make_norm(norm, args.q_rank)
            self.q_up = nn.Linear(args.q_rank, queries, bias=False)
        self.kv_down = nn.Linear(width, args.kv_rank + args.rope_dim, bias=args.bias)
        self.kv_norm = make_norm(norm, args.kv_rank)
        self.kv_up = nn.Linear(args.kv_rank, args.heads * (args.nope_dim + args.value_dim), bias=False)
        self.o_proj = nn.Linear(args.heads * args.value_dim, width, bias=args.bias)
        self.scale = (args.nope_dim + args.rope_dim) ** -0.5 if args.scale is None else args.scale
        self.pairing = config.ropes[args.rope].pairing if args.rope else "half"

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        """The proportions of DeepSeek-V2: a latent of four heads' channels."""
        dim = hidden_size // heads
        return {
            "heads": heads,
            "nope_dim": dim,
            "rope_dim": dim,
            "value_dim": dim,
            "kv_rank": 4 * dim,
            "rope": "default",
        }

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        q, turned = self._queries(x, ctx)
        seen, q_positions, k_positions = all_tokens(self._latents(x, ctx), ctx, cache)
        latent, shared = seen["latent"], seen["shared"]
        mask: dict[str, Any] = dict(causal=ctx.causal, q_positions=q_positions, k_positions=k_positions)
        mask |= dict(scale=self.scale, cu_seqlens=ctx.cu_seqlens, backend="eager" if ctx.eager else None)
        if self._absorbs(x, ctx, cache):
            key_up, value_up = self._up()
            q = torch.cat([torch.einsum("bthn,hnc->bthc", q, key_up), turned], dim=-1)
            o = attention(q, torch.cat([latent, shared], -1)[:, :, None], latent[:, :, None], **mask)
            o = torch.einsum("bthc,hvc->bthv", o, value_up)
        else:
            k, v = grouped(self.kv_up(latent), self.args.heads).split([self.args.nope_dim, self.args.value_dim], -1)
            shared = shared[:, :, None].expand(-1, -1, self.args.heads, -1)
            o = attention(torch.cat([q, turned], -1), torch.cat([k, shared.to(k.dtype)], -1), v, **mask)
        return self.o_proj(o.flatten(-2))

    def _queries(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """The parts of the queries, `[B, T, H, N]` and, turned by position, `[B, T, H, P]`."""
        q = self.q_proj(x) if self.args.q_rank is None else self.q_up(self.q_norm(self.q_down(x)))
        q, turned = grouped(q, self.args.heads).split([self.args.nope_dim, self.args.rope_dim], -1)
        return q, self._turn(turned, ctx)

    def _latents(self, x: Tensor, ctx: Context) -> dict[str, Tensor]:
        """c `[B, T, C]` and r `[B, T, P]`."""
        latent, shared = self.kv_down(x).split([self.args.kv_rank, self.args.rope_dim], -1)
        return {"latent": self.kv_norm(latent), "shared": self._turn(shared[:, :, None], ctx)[:, :, 0]}

    def _turn(self, x: Tensor, ctx: Context) -> Tensor:
        return x if self.args.rope is None else apply_rope(x, ctx.ropes[self.args.rope], self.pairing)

    def _absorbs(self, x: Tensor, ctx: Context, cache: LayerCache | None) -> bool:
        """Whether expanding every cached token would cost more than wider products, with U at hand to fold in."""
        plain = type(self.kv_up) is nn.Linear and not self.kv_up.weight.is_meta  # no adapter, not offloaded
        one = cache is not None and ctx.phase == "decode" and x.shape[1] == 1
        return self.args.absorb and plain and one and not torch.is_grad_enabled()

    def _up(self) -> tuple[Tensor, Tensor]:
        """The rows of U that make keys `[H, N, C]` and values `[H, V, C]`."""
        weight = self.kv_up.weight.unflatten(0, (self.args.heads, -1))
        key_up, value_up = weight.split([self.args.nope_dim, self.args.value_dim], 1)
        return key_up, value_up

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return length * (self.args.kv_rank + self.args.rope_dim) * itemsize


MODULE = LatentAttention
