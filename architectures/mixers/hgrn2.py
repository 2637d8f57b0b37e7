"""HGRN2 (Qin et al. 2024, arXiv 2404.07904): HGRN with a state of keys and values, the key being what is forgotten.

    S_t = Diag(f_t) S_{t-1} + (1 - f_t)^T v_t,   o_t = silu(x_t W_q) S_t,   y_t = rms(o_t over all heads) W_o
    f_t = b_l + (1 - b_l) sigmoid(x_t W_f),   b_l rising with the layer l from 0: see `core/lower_bounds.py`

B batch, T new tokens, D hidden size, H heads, K key and V value head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes, group_norm, recur, recurrent_bytes
from zoo.architectures.core.lower_bounds import BoundedForget
from zoo.architectures.core.mixer import Context, Mixer, grouped
from zoo.architectures.core.recurrent import gate_activation
from zoo.architectures.core.token_shift import DepthArgs

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24, "layer_index": 1, "depth": 3}
VARIANTS = {"first": {"heads": 4, "head_dim": 8, "gate": "silu"}}


@dataclass(frozen=True, kw_only=True)
class Args(DepthArgs):
    """`heads` with keys of `head_dim` (published: 128) and values of `value_dim` (None: `head_dim`); `gate` is the
    activation of an output gate (None, as published: no gate)."""

    heads: int
    head_dim: int
    value_dim: int | None = None
    gate: str | None = None
    norm_eps: float = 1e-5

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(heads=self.heads, head_dim=self.head_dim, value_dim=self.value_dim)
        gate_activation(self.gate)


class HGRN2(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.heads, hidden = args, args.heads, config.hidden_size
        self.key_dim, self.value_dim = args.head_dim, args.value_dim or args.head_dim
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.f_proj = nn.Linear(hidden, keys, bias=False)
        self.i_proj = nn.Linear(hidden, values, bias=False)
        self.forget = BoundedForget(args, keys)
        if args.gate is not None:
            self.g_proj = nn.Linear(hidden, values, bias=False)
        self.o_norm = nn.Parameter(torch.ones(values))
        self.o_proj = nn.Linear(values, hidden, bias=False)

    def init_weights(self, std: float) -> None:
        initialization.ones_(self.o_norm)
        if self.args.layer_index:
            initialization.zeros_(self.forget.bounds.gamma)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        decay = ctx.mask(grouped(self.forget(self.f_proj(x)), self.heads))
        k = -torch.expm1(decay)
        q, v = grouped(F.silu(self.q_proj(x)), self.heads), grouped(self.i_proj(x), self.heads)
        o = recur(q, k.to(q.dtype), ctx.mask(v), decay, ctx, cache)
        y = group_norm(o.to(x.dtype).flatten(-2), self.o_norm, self.args.norm_eps)
        if self.args.gate is not None:
            y = y * gate_activation(self.args.gate)(self.g_proj(x))
        return self.o_proj(y)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.key_dim, self.value_dim)


MODULE = HGRN2
