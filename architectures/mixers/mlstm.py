"""mLSTM, the matrix memory of xLSTM (Beck et al. 2024, arXiv 2405.04517), as in xLSTM 7B (2025, arXiv 2503.13427).

    C_t = f_t C_{t-1} + i_t k_t^T v_t,   n_t = f_t n_{t-1} + i_t k_t,   i = exp(i~),  f = sigmoid(f~)
    h_t = q_t C_t / max(|q_t n_t^T|, 1),   y_t = (sigmoid(x_t W_o) * norm(h_t)) W_out

computed under a running maximum of the gates. i~ and f~ are linear in x_t, one per head, capped to c tanh(. / c); the
norm is a layer norm of each head.

B batch, T new tokens, D hidden size, H heads, K key and V value head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes, recurrent_bytes
from zoo.architectures.core.mixer import Context, Mixer, grouped, keep_fp32, wide
from zoo.architectures.core.norms import head_norm
from zoo.architectures.core.recurrent import continued
from zoo.errors import ZooError
from zoo.kernels.mlstm import mlstm, mlstm_step

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24}
VARIANTS = {"uncapped": {"heads": 2, "head_dim": 16, "gate_softcap": None, "bias": True}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`value_dim` is V (None: `head_dim`), `gate_softcap` the cap c (None: none), `bias` that of all projections."""

    heads: int
    head_dim: int
    value_dim: int | None = None
    gate_softcap: float | None = 15.0
    norm_eps: float = 1e-6
    bias: bool = False

    def check(self, config: DecoderConfig) -> None:
        check_sizes(heads=self.heads, head_dim=self.head_dim, value_dim=self.value_dim)
        if self.gate_softcap is not None and self.gate_softcap <= 0:
            raise ZooError(f"gate_softcap was {self.gate_softcap}; it must be positive, or null for none")


class MLSTM(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, width = args, config.hidden_size
        self.heads, self.value_dim = args.heads, args.value_dim or args.head_dim
        keys, values = args.heads * args.head_dim, args.heads * self.value_dim
        self.q_proj = nn.Linear(width, keys, bias=args.bias)
        self.k_proj = nn.Linear(width, keys, bias=args.bias)
        self.v_proj = nn.Linear(width, values, bias=args.bias)
        self.g_proj = nn.Linear(width, values, bias=args.bias)
        self.o_proj = nn.Linear(values, width, bias=args.bias)
        self.input_gate = nn.Linear(width, args.heads, bias=False)
        self.forget_gate = nn.Linear(width, args.heads, bias=False)
        self.input_bias = keep_fp32(nn.Parameter(torch.zeros(args.heads, dtype=torch.float32)))
        self.forget_bias = keep_fp32(nn.Parameter(torch.zeros(args.heads, dtype=torch.float32)))
        self.norm_weight = nn.Parameter(torch.ones(values))

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        """The published shape: values as wide as the model, keys half as wide."""
        return {"heads": heads, "head_dim": hidden_size // heads // 2, "value_dim": hidden_size // heads}

    def init_weights(self, std: float) -> None:
        """As published: hardly any input, forget gates from 3 to 6 over the heads."""
        initialization.constant_(self.input_bias, -10.0)
        initialization.copy_(self.forget_bias, torch.linspace(3.0, 6.0, self.heads))
        initialization.ones_(self.norm_weight)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        q, k, v = (grouped(projection(x), self.heads) for projection in (self.q_proj, self.k_proj, self.v_proj))
        write, keep = self._gate(self.input_gate(x), self.input_bias), self._gate(self.forget_gate(x), self.forget_bias)
        if ctx.padding_mask is not None:  # padding writes nothing and forgets nothing
            padding = ~ctx.padding_mask[..., None]
            write, keep = write.masked_fill(padding, -torch.inf), keep.masked_fill(padding, torch.inf)
        size = self.args.head_dim
        matrix, vector, number = (self.heads, size, self.value_dim), (self.heads, size), (self.heads,)
        states = {"memory": matrix, "normalizer": vector, "maximum": number}
        h = continued(mlstm, mlstm_step, (q, k, v, write, keep), states, ctx, cache)
        h = head_norm(h, self.norm_weight, None, self.args.norm_eps)
        return self.o_proj(self.g_proj(x).sigmoid() * h.to(x.dtype))

    def _gate(self, x: Tensor, bias: Tensor) -> Tensor:
        """`[B, T, H]` in fp32."""
        gate, cap = wide(x) + wide(bias), self.args.gate_softcap
        return gate if cap is None else cap * torch.tanh(gate / cap)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.args.head_dim, self.value_dim + 1) + recurrent_bytes(self.heads, 1, 1)


MODULE = MLSTM
