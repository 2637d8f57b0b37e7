"""The shared transformer of Zamba2 (Glorioso et al. 2024, arXiv 2411.15242): attention and GeGLU without residuals.

    a = attention(N1([x, e])),   y = W_out down(gelu(g) * u),   [g, u] = (W + L) N2(a)

`e` is what entered the first layer. Attention and MLP are meant to be shared between layers; the adapters L of rank
`adapter_rank` on the MLP's (and by choice q, k and v's) projections, and W_out, are each layer's own.

B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import EMBEDDINGS, DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Part
from zoo.architectures.core.norms import make_norm
from zoo.architectures.mixers import attention

_SIZES: dict[str, Any] = {"heads": 4, "head_dim": 32, "intermediate_size": 96, "adapter_rank": 4}
EXAMPLE = {**_SIZES, "kv_heads": 2, "rope": "default"}
VARIANTS = {"adapted_attention": {**_SIZES, "adapt_attention": True, "bias": True}}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
SHARED = (
    "attention_norm",
    "mlp_norm",
    *(f"attention.{name}.base" for name in PROJECTIONS),
    "attention.o_proj",
    "gate_up_proj.base",
    "down_proj",
)


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`bias` is that of the MLP; scores are scaled by `(head_dim / 2) ** -0.5`, as published."""

    heads: int
    head_dim: int
    intermediate_size: int
    adapter_rank: int
    kv_heads: int | None = None
    adapt_attention: bool = False
    rope: str | None = None
    bias: bool = False

    def attention(self) -> attention.Args:
        """The arguments of the attention inside."""
        scale = (self.head_dim / 2) ** -0.5
        return attention.Args(
            heads=self.heads, head_dim=self.head_dim, kv_heads=self.kv_heads, rope=self.rope, scale=scale
        )

    def check(self, config: DecoderConfig) -> None:
        check_sizes(intermediate_size=self.intermediate_size, adapter_rank=self.adapter_rank)
        self.attention().check(config)


class Adapted(nn.Module):
    """`base(x) + up(down(x))`; without a rank, `base(x)` alone."""

    def __init__(self, inputs: int, outputs: int, rank: int | None, bias: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=bias)
        self.adapted = rank is not None
        if rank is not None:
            self.down = nn.Linear(inputs, rank, bias=False)
            self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.up(self.down(x)) if self.adapted else y


class Zamba2Transformer(Part):
    options = Args
    reads = (EMBEDDINGS,)

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        width, rank = config.hidden_size, args.adapter_rank
        self.attention_norm = make_norm(config.norm, 2 * width)
        self.attention = attention.Attention(config, args.attention())
        for name in PROJECTIONS:
            plain = cast(nn.Linear, self.attention.get_submodule(name))
            wider = Adapted(2 * width, plain.out_features, rank if args.adapt_attention else None)
            setattr(self.attention, name, wider)
        self.mlp_norm = make_norm(config.norm, width)
        self.gate_up_proj = Adapted(width, 2 * args.intermediate_size, rank, bias=args.bias)
        self.down_proj = nn.Linear(args.intermediate_size, width, bias=args.bias)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        both = torch.cat([x, ctx.values[EMBEDDINGS].to(x.dtype)], dim=-1)
        seen = self.attention(self.attention_norm(both), ctx, cache)
        gate, up = self.gate_up_proj(self.mlp_norm(seen)).chunk(2, dim=-1)
        return self.out_proj(self.down_proj(F.gelu(gate) * up))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return self.attention.state_bytes(length, itemsize)


MODULE = Zamba2Transformer
