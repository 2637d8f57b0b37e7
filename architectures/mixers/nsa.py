"""Native sparse attention (NSA, Yuan et al. 2025, arXiv 2502.11089): three branches with keys and values of their own.

    o = g_cmp Attn(q, K_cmp, V_cmp) + g_slc Attn(q, K_I, V_I) + g_win Attn(q, K_win, V_win)     g = sigmoid(x W)
    k_cmp_i = MLP(k_j + e_{j - id}, id <= j < id + l)     one for each window of l tokens every d ones, v likewise
    I: the first block, those of the last tokens, and the blocks of l' tokens with the largest
    sum over the heads of a group of  sum_i overlap(i, block) softmax_i(q . k_cmp_i)

with overlap(i, block) how many strides of window i lie in the block. The window branch sees the last `window` tokens.
Every head has its gates; heads that share KV heads share blocks. RoPE turns a compressed key to the position of its
window's first token (the paper leaves this open). Prefill and decode are the same function.

B batch, T new tokens, D hidden size, C tokens of a window, M new windows, H query heads, G KV heads, K and V head
dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys, all_tokens, recent_tokens
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Mixer, Output, grouped
from zoo.architectures.core.rope import RotaryTable
from zoo.architectures.core.routing import block_weights, route, window_weights
from zoo.architectures.core.sparse import SparseArgs, SparseAttention, view_of
from zoo.architectures.core.windows import attend_entries, count, ended, entries, sequences
from zoo.errors import ZooError
from zoo.kernels.attention import attention

SIZES = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"}
EXAMPLE = {**SIZES, "size": 4, "stride": 2, "block": 16, "window": 5, "budget": 1.0}
VARIANTS = {"odd": {**EXAMPLE, "value_dim": 24, "qk_norm": "rms", "size": 3, "stride": 1, "budget": 32, "q_bias": True}}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`size` l and `stride` d of the compressed windows; `block` l' of the selected blocks, which `budget` counts with
    the `init` first and the `local` last ones; `hidden` width of the compressing MLPs (None: the head's)."""

    size: int = 32
    stride: int = 16
    block: int = 64
    init: int = 1
    local: int = 2
    window: int = 512
    hidden: int | None = None
    budget: Any = 1024

    @property
    def block_size(self) -> int:
        return self.block

    def check_method(self) -> None:
        check_sizes(size=self.size, stride=self.stride, local=self.local, window=self.window, hidden=self.hidden)
        if not 16 <= self.block <= 128:
            raise ZooError(f"block was {self.block}; it must be 16 to 128")
        for name in ("size", "block"):
            if getattr(self, name) % self.stride:
                raise ZooError(f"stride was {self.stride}; it must divide {name} {getattr(self, name)}")
        if self.init < 0:
            raise ZooError(f"init was {self.init}; it may not be negative")
        super().check_method()


class Compress(nn.Module):
    """`[B, M, C, G, K]` to `[B, M, G, K]`: an MLP over a window's tokens with embeddings of their places."""

    def __init__(self, size: int, width: int, hidden: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(size, width))
        self.up = nn.Linear(size * width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        flat = (x + self.places[:, None]).movedim(2, 3).flatten(3)
        return self.down(F.gelu(self.up(flat)))


class NativeSparseAttention(SparseAttention):
    options = Args
    phase_consistent = True
    from_attention = Mixer.__dict__["from_attention"]  # three sets of keys and values have no counterpart

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        keys, values = self.kv_heads * self.head_dim, self.kv_heads * self.value_dim
        self.compressed_k_proj = nn.Linear(config.hidden_size, keys, bias=args.k_bias)
        self.compressed_v_proj = nn.Linear(config.hidden_size, values, bias=args.v_bias)
        self.window_k_proj = nn.Linear(config.hidden_size, keys, bias=args.k_bias)
        self.window_v_proj = nn.Linear(config.hidden_size, values, bias=args.v_bias)
        self.k_compress = Compress(args.size, self.head_dim, args.hidden or self.head_dim)
        self.v_compress = Compress(args.size, self.value_dim, args.hidden or self.value_dim)
        self.gate_proj = nn.Linear(config.hidden_size, 3 * self.heads)
        if args.rope is not None:
            self.table = RotaryTable(config.ropes[args.rope], config.max_position_embeddings)

    def make_rule(self, args: Any) -> Any:
        return None

    def init_weights(self, std: float) -> None:
        for module in (self.k_compress, self.v_compress):
            initialization.normal_(module.places, mean=0.0, std=std)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Output:
        if ctx.cu_seqlens is not None:
            return sequences(self.forward, x, ctx)
        q, gate = self.queries(x, ctx)
        k, v = self._compressed(x, ctx, cache)
        seen = attend_entries(q, k, v, ctx, self.args.size, self.args.stride, self.args.scale)[0]
        parts = (seen, self._selected(q, k, self.visible(x, ctx, cache), ctx), self._local(q, x, ctx, cache))
        shares = torch.sigmoid(self.gate_proj(x)).unflatten(-1, (self.heads, 3))
        o = torch.einsum("bthvn,bthn->bthv", torch.stack(parts, -1), shares.to(q.dtype)).flatten(-2)
        return self.o_proj(o if gate is None else o * torch.sigmoid(gate))

    def _compressed(self, x: Tensor, ctx: Context, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """Compressed keys and values `[B, N, G, K]` of all windows that have ended."""
        new = {
            "compressed_k": grouped(self.compressed_k_proj(x), self.kv_heads),
            "compressed_v": grouped(self.compressed_v_proj(x), self.kv_heads),
        }
        found = ended(new, ctx, cache, self.args.size, self.args.stride)
        k = self._normed(self.k_compress(found.tokens["compressed_k"]).flatten(-2), "k_norm", self.kv_heads)
        if self.args.rope is not None:
            ctx = found.rotated_at(0, self.table, self.args.rope, ctx)
        k, v = self.rotated(k, "k_norm", ctx), self.v_compress(found.tokens["compressed_v"])
        return entries("compressed_k", k, found, ctx, cache), entries("compressed_v", v, found, ctx, cache)

    def _selected(self, q: Tensor, compressed: Tensor, keys: Keys, ctx: Context) -> Tensor:
        """`[B, T, H, V]` of the blocks that the compressed keys point to."""
        args, view = self.args, view_of(q, keys, ctx, self.args.scale)
        blocks = -(-view.k.shape[1] // args.block)

        def weigh(part: Tensor, at: Tensor) -> Tensor:
            weights = window_weights(part, compressed, at, args.size, args.stride, args.scale)
            return block_weights(weights, args.size, args.stride, args.block, blocks, "sum")

        sizes: dict[str, Any] = dict(block=args.block, width=compressed.shape[1])
        lists, counts = route(view, weigh, args.schedule, local=args.local, sink=args.init, **sizes)
        return view.attend(lists, counts, query_block=1, block=args.block)

    def _local(self, q: Tensor, x: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        """`[B, T, H, V]` of the last tokens."""
        k = self.rotated(self._normed(self.window_k_proj(x), "k_norm", self.kv_heads), "k_norm", ctx)
        new = {"k": k, "v": grouped(self.window_v_proj(x), self.kv_heads)}
        if cache is None:
            seen, q_at, k_at = all_tokens(new, ctx, None)
        else:
            seen, q_at, k_at = recent_tokens(new, ctx, cache.view("window"), self.args.window - 1)  # type: ignore[arg-type]
        call = self.call(Keys(seen["k"], seen["v"], q_at, k_at), ctx)
        o: Tensor = attention(q, seen["k"], seen["v"], window=self.args.window, **call)
        return o

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        args, token = self.args, self.kv_heads * (self.head_dim + self.value_dim) * itemsize
        compressed = (count(length, args.size, args.stride) + args.size - 1) * token
        local = (args.window - 1) * (token + torch.int64.itemsize)
        return super().state_bytes(length, itemsize) + compressed + local


MODULE = NativeSparseAttention
