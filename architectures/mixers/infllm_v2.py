"""InfLLM-V2 (Zhao et al. 2025, arXiv 2509.24663; in MiniCPM4, arXiv 2506.07900): top-k blocks without parameters.

    p_i = sum over the heads of a group of softmax_i(scale q . c_i)     c_i the mean key of window i: `kernel` tokens
    s_b = max of p_i over the windows that overlap block b                                   every `stride` ones
    o = softmax(q K_I^T) V_I       I: the first blocks, those of the local window, and the best of the others

Query heads that share a KV head share blocks; each query has its own. A query at a position below `dense_len` sees all
tokens so far. Prefill and decode are the same function. The cache notes the means of every `stride` keys.

B batch, T new tokens, S keys, N windows, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.block_lists import by_sequence
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.means import means_bytes, piece_means
from zoo.architectures.core.routing import block_weights, real_first, route, window_weights
from zoo.architectures.core.sparse import Method, SparseArgs, SparseAttention, View
from zoo.errors import ZooError

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "budget": 1.0}
SMALL = {"block": 16, "kernel": 8, "stride": 4, "window": 16, "dense_len": 0}
VARIANTS = {"small": {**EXAMPLE, **SMALL, "budget": 48}}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`block` tokens of a block, which `budget` counts with the `init` first ones and those of the local `window`
    tokens: by default the published 64 and the window's 32. `kernel` and `stride` are those of the windows."""

    block: int = 64
    kernel: int = 32
    stride: int = 16
    init: int = 1
    window: int = 2048
    dense_len: int = 8192
    budget: Any = 6144

    @property
    def block_size(self) -> int:
        return self.block

    def check_method(self) -> None:
        check_sizes(kernel=self.kernel, stride=self.stride)
        if not 16 <= self.block <= 128:
            raise ZooError(f"block was {self.block}; it must be 16 to 128")
        for name in ("kernel", "block"):
            if getattr(self, name) % self.stride:
                raise ZooError(f"stride was {self.stride}; it must divide {name} {getattr(self, name)}")
        for name in ("init", "window", "dense_len"):
            if getattr(self, name) < 0:
                raise ZooError(f"{name} was {getattr(self, name)}; it may not be negative")
        super().check_method()

    @property
    def local(self) -> int:
        """Blocks of the local window, the own one counted."""
        return max(1, -(-self.window // self.block))

    def dense(self, length: int) -> bool:
        """Whether all queries among `length` tokens see everything."""
        return self.everything or length <= self.dense_len


class InfLLM(Method):
    phases = ("prefill", "decode")
    name = "infllm_v2"

    def prefill(self, view: View) -> Tensor:
        if self.args.dense(view.k.shape[1]):
            return view.dense()
        return by_sequence(self._routed, view)

    decode = prefill

    def _routed(self, view: View) -> Tensor:
        args, blocks = self.args, -(-view.k.shape[1] // self.args.block)
        compressed = windows(piece_means(view, args.stride), args.kernel // args.stride)

        def weigh(q: Tensor, at: Tensor) -> Tensor:
            weights = window_weights(q, compressed, at, args.kernel, args.stride, view.scale)
            return block_weights(weights, args.kernel, args.stride, args.block, blocks, "max")

        width = compressed.shape[1]
        lists, counts = route(
            view, weigh, args.schedule, block=args.block, width=width, local=args.local, sink=args.init
        )
        if args.dense_len:
            lists, counts = self._with_dense(view, lists, counts, blocks)
        return view.attend(lists, counts, query_block=1, block=args.block)

    def _with_dense(self, view: View, lists: Tensor, counts: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """The lists, but all blocks for queries at positions below `dense_len`."""
        at = real_first(view)[1][:, None]
        early, whole = at < self.args.dense_len, min(blocks, -(-self.args.dense_len // self.args.block))
        lists = F.pad(lists, (0, max(0, whole - lists.shape[3])), value=-1)
        every = torch.arange(lists.shape[3], device=lists.device, dtype=lists.dtype)
        own = (at // self.args.block + 1).to(counts.dtype).expand_as(counts)
        return torch.where(early[..., None], every, lists), torch.where(early, own, counts)


def windows(means: Tensor, pieces: int) -> Tensor:
    """Mean keys `[B, N, G, K]` of windows of `pieces` pieces, from the pieces' `[B, n, G, K]`."""
    if means.shape[1] < pieces:
        return means[:, :0]
    return means.unfold(1, pieces, 1).mean(-1)


class InfLLMAttention(SparseAttention):
    options = Args
    method = InfLLM
    phase_consistent = True

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        noted = means_bytes(length, self.args.stride, self.kv_heads, self.head_dim, itemsize)
        return super().state_bytes(length, itemsize) + (0 if self.args.dense(length) else noted)


MODULE = InfLLMAttention
