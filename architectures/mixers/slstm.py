"""sLSTM, the scalar memory of xLSTM with memory mixing (Beck et al. 2024, arXiv 2405.04517).

    c_t = f_t c_{t-1} + i_t tanh(z~_t),   n_t = f_t n_{t-1} + i_t,   h_t = sigmoid(o~_t) c_t / n_t
    i = exp(i~),  f = sigmoid(f~),   [i~, f~, z~, o~]_t = x_t W + h_{t-1} R + b,   y_t = norm(h_t)

W and R are block-diagonal: a head sees its own channels alone. i~ and f~ read x after a short causal convolution and
SiLU; the norm is a layer norm of each head. h_{t-1} enters the gates, so tokens are taken one by one.

B batch, T new tokens, D hidden size, H heads, K = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes, check_width
from zoo.architectures.core.mixer import Context, Mixer, grouped, keep_fp32, wide, wide_dtype
from zoo.architectures.core.norms import head_norm
from zoo.architectures.core.recurrent import ConvStates
from zoo.architectures.core.token_shift import DepthArgs
from zoo.errors import ZooError
from zoo.kernels.slstm import slstm, slstm_step

EXAMPLE = {"heads": 4, "layer_index": 1, "depth": 3}
VARIANTS = {"bare": {"heads": 2, "conv": 0}}
GATES = 4  # input, forget, cell, output, in this order
STATES = ("cell", "normalizer", "hidden", "maximum")
Gates = Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Args(DepthArgs):
    """`heads` divides the hidden size; `conv` is the width of the convolution before two of the gates (0: none)."""

    heads: int
    conv: int = 4
    norm_eps: float = 1e-5

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(heads=self.heads)
        check_width(self.conv, None)
        if config.hidden_size % self.heads:
            raise ZooError(f"heads was {self.heads}; it must divide hidden_size ({config.hidden_size})")


class SLSTM(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.heads, self.width = args, args.heads, config.hidden_size
        size = config.hidden_size // args.heads
        self.gates = nn.Parameter(torch.zeros(GATES, args.heads, size, size))
        self.recurrent = nn.Parameter(torch.zeros(GATES, args.heads, size, size))
        self.gate_bias = keep_fp32(nn.Parameter(torch.zeros(GATES, args.heads, size, dtype=torch.float32)))
        self.norm_weight = nn.Parameter(torch.ones(config.hidden_size))
        self.convs = ConvStates({"x": config.hidden_size}, args.conv, "silu" if args.conv else None, args.conv > 0)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return {"heads": heads}

    def init_weights(self, std: float) -> None:
        """As published: no recurrence yet, forget gates along a power that depends on the layer."""
        initialization.normal_(self.gates, std=math.sqrt(2 / (5 * self.width)))
        initialization.zeros_(self.recurrent)
        size = self.width // self.heads
        line = (torch.arange(size) / max(size - 1, 1)) ** (0.3 + 1.3 * self.args.risen)
        bias = torch.zeros(GATES, self.heads, size)
        bias[1] = 5 - 12 * line
        initialization.copy_(self.gate_bias, bias)
        initialization.ones_(self.norm_weight)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        x = ctx.mask(x)
        smooth = self.convs("x", x, ctx, cache)
        inputs = torch.stack([grouped(part, self.heads) for part in (smooth, smooth, x, x)])
        mapped = torch.einsum("gbthi,ghoi->gbtho", inputs, self.gates.to(inputs.dtype))
        gates = (wide(mapped) + wide(self.gate_bias)[:, None, None]).unbind()
        h = self._recur(gates, ctx, cache) if ctx.padding_mask is None else self._skipping(gates, ctx, cache)
        return head_norm(h, self.norm_weight, None, self.args.norm_eps).to(x.dtype)

    def _skipping(self, gates: Gates, ctx: Context, cache: LayerCache | None) -> Tensor:
        """As `_recur`, with the real tokens of each row moved to its start: a padded token in between would read the
        memory with its own output gate, and the next one would see that."""
        assert ctx.padding_mask is not None
        order = (~ctx.padding_mask).int().argsort(dim=1, stable=True)
        write, keep, cell, read = (_picked(gate, order) for gate in gates)
        counts = ctx.padding_mask.sum(1)
        padding = (torch.arange(order.shape[1], device=order.device) >= counts[:, None])[..., None, None]
        write, keep = write.masked_fill(padding, -torch.inf), keep.masked_fill(padding, torch.inf)
        return _picked(self._recur((write, keep, cell, read), ctx, cache, counts), order.argsort(1))

    def _recur(self, gates: Gates, ctx: Context, cache: LayerCache | None, counts: Tensor | None = None) -> Tensor:
        """Hidden states `[B, T, H, K]`; with `counts [B]`, only so many tokens of each row are real."""
        write, keep, cell, read = gates
        if cache is None:
            return slstm(cell, write, keep, read, self.recurrent, cu_seqlens=ctx.cu_seqlens)[0]
        shape = (cell.shape[0], *cell.shape[2:])
        c, n, h, m = (cache.state(name, shape, wide_dtype(cell), "recurrent", cell.device) for name in STATES)
        if ctx.phase == "decode" and cell.shape[1] == 1 and counts is None and not torch.is_grad_enabled():
            return slstm_step(cell, write, keep, read, self.recurrent, state=(c, n, h, m))
        o, new = slstm(cell, write, keep, read, self.recurrent, initial_state=(c, n, h, m), output_final_state=True)
        assert new is not None
        c, n, last, m = new
        if counts is not None:
            last = _picked(torch.cat([h[:, None], o], 1), counts[:, None])[:, 0]
        for name, value in zip(STATES, (c, n, last, m), strict=True):
            cache.put(name, value)
        return o

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return len(STATES) * self.width * torch.float32.itemsize + self.convs.state_bytes(itemsize)


def _picked(x: Tensor, places: Tensor) -> Tensor:
    """`x [B, T, H, K]` at the `places [B, S]` of its second axis."""
    return x.gather(1, places[..., None, None].expand(-1, -1, *x.shape[2:]))


MODULE = SLSTM
