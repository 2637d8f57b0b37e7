"""GateLoop (Katsch 2023, arXiv 2311.01927): linear attention whose state decays and turns as the data say.

    S_t = Diag(a_t) S_{t-1} + k_t^T v_t,   o_t = Re(q_t S_t),   a_t = sigmoid(x_t W_r) exp(i x_t W_p)

with one complex number per key channel. q and k are real, so that with Phi_t the sum of the phases up to t the same is
a real recurrence over keys [k cos Phi, k sin Phi] and queries [q cos Phi, q sin Phi].

B batch, T new tokens, H heads, K key and V value head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.features import cosine_pair
from zoo.architectures.core.linear import recur, recurrent_bytes
from zoo.architectures.core.mixer import Context, grouped, wide, wide_dtype
from zoo.architectures.core.output import GatedOutput, OutputArgs

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24, "norm": True}
VARIANTS = {"many": {"heads": 48, "head_dim": 1}}


@dataclass(frozen=True, kw_only=True)
class Args(OutputArgs):
    """The published model has as many heads as channels (`head_dim` 1), the output gate, and no norm."""

    norm: bool = False


class GateLoop(GatedOutput):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.key_dim, self.value_dim = args.head_dim, args.value_dim or args.head_dim
        self.make_projections(config, args, self.value_dim)
        self.make_output(config, args, self.value_dim)
        self.a_proj = nn.Linear(config.hidden_size, 2 * self.heads * self.key_dim, bias=False)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        q, k, v = self.expanded_qkv(x, ctx)
        size, phase = (grouped(part, self.heads) for part in wide(self.a_proj(x)).chunk(2, dim=-1))
        angles = self._angles(ctx.mask(phase), ctx, cache)
        q, k = cosine_pair(q, angles), cosine_pair(k, angles)
        decay = ctx.mask(F.logsigmoid(size)).repeat(1, 1, 1, 2)
        return self.finish(recur(q, ctx.mask(k), ctx.mask(v), decay, ctx, cache, scale=1.0), x)

    def _angles(self, phase: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        """Phi `[B, T, H, K]`, up to whole turns; of packed rows it runs on, as differences alone matter."""
        total = phase.double().cumsum(dim=1)  # a long sum of fp32 angles loses the angle
        if cache is not None:
            shape = (phase.shape[0], *phase.shape[2:])
            before = cache.state("angle", shape, wide_dtype(phase), "recurrent", phase.device)
            total = total + before.double()[:, None]
            cache.put("angle", total[:, -1].remainder(2 * math.pi).to(before.dtype))
        return total.remainder(2 * math.pi).to(phase.dtype)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        angles = self.heads * self.key_dim * torch.float32.itemsize
        return recurrent_bytes(self.heads, 2 * self.key_dim, self.value_dim) + angles


MODULE = GateLoop
