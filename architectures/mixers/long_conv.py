"""Long convolution: attention as one causal convolution with a large kernel (LKCA, Li et al. 2024, arXiv 2401.05738).

    y_t = (sum over j < W of w_j * v_{t-j}) W_o,   v = x W_v,   one kernel w per channel

The paper's convolution is over images; this is its causal form over sequences, which has no queries and keys either.

B batch, T new tokens, D hidden size, A channels, W kernel width, N packed sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer, wide
from zoo.architectures.core.recurrent import gate_activation
from zoo.errors import ZooError

EXAMPLE = {"kernel": 6}
VARIANTS = {"gated": {"kernel": 40, "width": 48, "gate": "silu"}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`kernel` is W, in tokens: older ones are not seen. `width` is A (None: the hidden size); `gate` is the activation
    of an output gate (None: no gate)."""

    kernel: int = 1024
    width: int | None = None
    gate: str | None = None

    def check(self, config: DecoderConfig) -> None:
        check_sizes(width=self.width)
        if self.kernel < 2:
            raise ZooError(f"kernel was {self.kernel}; it must be at least 2")
        gate_activation(self.gate)


class LongConv(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.channels = args, args.width or config.hidden_size
        self.v_proj = nn.Linear(config.hidden_size, self.channels, bias=False)
        self.o_proj = nn.Linear(self.channels, config.hidden_size, bias=False)
        self.kernel = nn.Parameter(torch.zeros(args.kernel, self.channels))
        if args.gate is not None:
            self.g_proj = nn.Linear(config.hidden_size, self.channels, bias=False)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return {}

    def init_weights(self, std: float) -> None:
        """Uniform in +-1/sqrt(W), the start of torch's depthwise convolution."""
        bound = 1 / math.sqrt(self.args.kernel)
        initialization.uniform_(self.kernel, -bound, bound)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        v = ctx.mask(self.v_proj(x))
        y = self._packed(v, ctx) if ctx.cu_seqlens is not None else self._continued(v, cache)
        y = y.to(x.dtype)
        return self.o_proj(y if self.args.gate is None else y * gate_activation(self.args.gate)(self.g_proj(x)))

    def _continued(self, v: Tensor, cache: LayerCache | None) -> Tensor:
        """The convolution of `v [B, T, A]` and what the cache keeps of the inputs before."""
        if cache is None:
            return convolved(v, self.kernel)
        before = self.args.kernel - 1
        held = torch.cat([cache.state("inputs", (v.shape[0], before, v.shape[2]), v.dtype, "conv", v.device), v], 1)
        cache.put("inputs", held[:, v.shape[1] :].contiguous(), "conv")
        if v.shape[1] == 1:
            return torch.einsum("bwa,wa->ba", wide(held), wide(self.kernel).flip(0))[:, None]
        return convolved(held, self.kernel)[:, before:]

    def _packed(self, v: Tensor, ctx: Context) -> Tensor:
        """The convolution of packed sequences `v [1, T, A]`, each in a row of its own."""
        assert ctx.cu_seqlens is not None
        bounds, tokens = ctx.cu_seqlens.long(), torch.arange(v.shape[1], device=v.device)
        longest, row = ctx.max_seqlen or v.shape[1], torch.searchsorted(bounds, tokens, right=True) - 1
        place = row * longest + tokens - bounds[row]
        rows = v.new_zeros((bounds.shape[0] - 1) * longest, v.shape[2]).index_copy(0, place, v[0])
        y = convolved(rows.unflatten(0, (-1, longest)), self.kernel)
        return y.flatten(0, 1)[place][None]

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return (self.args.kernel - 1) * self.channels * itemsize


def convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """`sum over j of kernel[j] x[t - j]`, in fp32 (fp64): `x [N, T, A]`, `kernel [W, A]` -> `[N, T, A]`."""
    tokens = x.shape[1]
    weights = wide(kernel)[:tokens]
    size = tokens + weights.shape[0] - 1  # long enough that the end does not come around to the start
    spectrum = torch.fft.rfft(wide(x), n=size, dim=1) * torch.fft.rfft(weights, n=size, dim=0)
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, :tokens]


MODULE = LongConv
