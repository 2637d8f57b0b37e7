"""Titans (Behrouz et al. 2025, arXiv 2501.00663): attention as short-term memory beside a network that learns as it
reads, the long-term memory M of `core/memory.py`. The ways to put them together, P being learned persistent tokens:

    memory (MAC)   for each segment x of C tokens:  y = attention([P, M(x), x]),   o = y (x) M'(y)
    gate (MAG)     o = attention([P, x]) (x) M(x)
    layer (MAL)    o = attention([P, M(x)])

In MAC, M is the network as it was before the segment, and only read; M' then learns y, token by token. Attention is
causal, within the segment, or over a window in MAG and MAL. `a (x) b` is norm(a) * sigmoid(norm(b)). Persistent tokens
enter attention alone: what M would make of them is part of its learned start.

B batch, T new tokens, N sequences, D hidden size, H heads, K head dimension, C segment, G KV heads (H).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.memory import NeuralMemory
from zoo.architectures.core.mixer import Context, Mixer, grouped
from zoo.architectures.core.norms import RMSNorm
from zoo.architectures.core.recurrent import check_rope
from zoo.architectures.core.segments import Segments
from zoo.architectures.core.softmax import SoftmaxArgs, SoftmaxAttention, merge
from zoo.architectures.core.test_time import OFFSET, Tree, keep
from zoo.errors import ZooError
from zoo.kernels.attention import attention

FORMS = ("memory", "gate", "layer")
EXAMPLE = {"heads": 2, "head_dim": 16, "mini_batch": 4, "window": 5, "rope": "default"}
VARIANTS = {
    "layer": {**EXAMPLE, "variant": "layer", "memory_width": None, "persistent": 0},
    "memory": {**EXAMPLE, "variant": "memory", "window": None, "conv": 0},
}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`variant` is one of those above. `persistent` is the number of persistent tokens; `window` that of keys which
    MAG's and MAL's attention sees (None: all), MAC having its segments.

    `memory_width` is the hidden width of the network of each head (None: a linear map), `mini_batch` the tokens that
    take their gradients at the same weights, in MAC the segment; `conv` the width of the short convolutions on its q,
    k and v (0: none, as MAC must have); `base_lr` the largest learning rate.
    """

    heads: int
    head_dim: int
    variant: str = "gate"
    persistent: int = 4
    window: int | None = None
    rope: str | None = None
    memory_width: int | None = 64
    mini_batch: int = 16
    conv: int = 4
    base_lr: float = 0.02

    def check(self, config: DecoderConfig) -> None:
        sizes = dict(heads=self.heads, head_dim=self.head_dim, window=self.window, memory_width=self.memory_width)
        check_sizes(**sizes, mini_batch=self.mini_batch)
        check_rope(self.rope, config)
        if self.variant not in FORMS:
            raise ZooError(f"variant {self.variant!r} is unknown; it must be one of {', '.join(FORMS)}")
        if self.persistent < 0 or self.conv < 0:
            raise ZooError(f"persistent was {self.persistent} and conv {self.conv}; neither may be negative")
        if self.variant == "memory" and (self.window is not None or self.conv):
            raise ZooError(f"window was {self.window} and conv {self.conv}; variant memory has window null and conv 0")


class PersistentTokens(nn.Module):
    """`forward() -> [P, D]`."""

    def __init__(self, count: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(count, hidden))

    def forward(self) -> Tensor:
        return self.tokens


class PersistentAttention(SoftmaxAttention):
    """Attention that also sees persistent tokens `[P, D]`, which have no position."""

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, SoftmaxArgs(heads=args.heads, head_dim=args.head_dim, rope=args.rope))
        self.window = args.window
        if args.persistent:
            self.persistent = PersistentTokens(args.persistent, config.hidden_size)

    def init_weights(self, std: float) -> None:
        if hasattr(self, "persistent"):
            initialization.normal_(self.persistent.tokens)

    @property
    def recent(self) -> int | None:
        return self.window

    def call(self, keys: Keys, ctx: Context) -> dict[str, Any]:
        return super().call(keys, ctx) | {"window": self.window}

    def attend(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        call = self.call(keys, ctx)
        if not hasattr(self, "persistent"):
            o: Tensor = attention(q, keys.k, keys.v, **call)
            return o
        parts = [attention(q, keys.k, keys.v, return_lse=True, **call)]
        k, v = (p(self.persistent().to(q.dtype)).expand(q.shape[0], -1, -1) for p in (self.k_proj, self.v_proj))
        k, v = grouped(k, self.kv_heads), grouped(v, self.kv_heads)
        parts.append(attention(q, k, v, causal=False, return_lse=True, backend=call["backend"]))
        return merge(parts)


class Titans(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args = args
        self.attention = PersistentAttention(config, args)
        self.memory = NeuralMemory(
            config.hidden_size,
            args.heads,
            args.head_dim,
            width=args.memory_width,
            mini_batch=args.mini_batch,
            conv=args.conv,
            base_lr=args.base_lr,
        )
        if args.variant != "layer":
            self.o_norm, self.m_norm = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"rope": "default"}

    def init_weights(self, std: float) -> None:
        self.memory.reset()

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        if self.args.variant == "memory":
            return self._segments(x, ctx, cache)
        views: Any = (None, None) if cache is None else (cache.view("attention"), cache.view("memory"))
        remembered = self.memory(x, ctx, views[1])
        if self.args.variant == "layer":
            return self._plain(self.attention(remembered, ctx, views[0]))
        return self._gated(self._plain(self.attention(x, ctx, views[0])), remembered)

    @staticmethod
    def _plain(y: Any) -> Tensor:
        assert isinstance(y, Tensor)
        return y

    def _gated(self, y: Tensor, remembered: Tensor) -> Tensor:
        return self.o_norm(y) * self.m_norm(remembered).sigmoid()

    def _segments(self, x: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        size, state, held = self.args.mini_batch, None, None
        if cache is not None:
            state = self.memory.learner.begun(self.memory.learner.stored(x.shape[0], cache.view("memory")))
        plan = Segments(ctx, size, None if state is None else state[OFFSET])
        if cache is not None:
            shape = (x.shape[0], size, 2, self.args.heads, self.args.head_dim)
            held = tuple(cache.state(f"segment_{name}", shape, x.dtype, "ring", x.device) for name in "kv")
        y, kept, state = self._walk(x, ctx, plan, state or self.memory.learner.start(plan.rows), held)
        if cache is not None:
            keep(state, cache.view("memory"))
            for name, value in zip("kv", kept, strict=True):
                cache.put(f"segment_{name}", plan.last(value).to(x.dtype), "ring")
        return plan.gather(y)

    def _walk(
        self, x: Tensor, ctx: Context, plan: Segments, state: Tree, held: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, list[Tensor], Tree]:
        """Outputs `[N, M C, D]`, keys and values of M(x) and x `[N, M C, 2, G, K]`, and the memory's next state.

        `held` are keys and values of the segment that an earlier call began.
        """
        laid = [plan.lay(part) for part in (x, self.attention.queries(x, ctx)[0], *self.attention.keys_values(x, ctx))]
        ropes = {name: (plan.lay(cos), plan.lay(sin)) for name, (cos, sin) in ctx.ropes.items()}
        positions, alone = plan.lay(ctx.positions), held is None and ctx.padding_mask is None and ctx.cu_seqlens is None
        outputs: list[Tensor] = []
        kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        for m in range(plan.count):
            part = slice(m * plan.size, (m + 1) * plan.size)
            here = {name: (cos[:, part], sin[:, part]) for name, (cos, sin) in ropes.items()}
            inside = replace(ctx, positions=positions[:, part], ropes=here, padding_mask=None, cu_seqlens=None)
            xs, q, *seen = (y[:, part] for y in laid)
            recalled = self.attention.keys_values(self.memory.read(xs, state), inside)
            both = [torch.stack(pair, dim=2) for pair in zip(recalled, seen, strict=True)]
            if held is not None and m == 0:
                new = plan.there[:, part, None, None, None]
                both = [torch.where(new, y, old.to(y.dtype)) for y, old in zip(both, held, strict=True)]
            y = self._attend(q, both, inside)
            remembered, state = self.memory.advance(y, state, None if alone else plan.there[:, part])
            outputs.append(self._gated(y, remembered))
            for values, value in zip(kept, both, strict=True):
                values.append(value)
        return torch.cat(outputs, 1), [torch.cat(values, 1) for values in kept], state

    def _attend(self, q: Tensor, both: list[Tensor], ctx: Context) -> Tensor:
        """Attention of one segment `q [N, C, H, K]` over `[N, C, 2, G, K]`: `[N, C, D]`."""
        places = torch.arange(q.shape[1], device=q.device)
        k, v = (y.flatten(1, 2) for y in both)
        keys = Keys(k, v, places, places.repeat_interleave(2))
        return self.attention.o_proj(self.attention.attend(q, keys, ctx).flatten(-2))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        if self.args.variant != "memory":
            return self.memory.state_bytes(itemsize) + self.attention.state_bytes(length, itemsize)
        segment = 4 * self.args.mini_batch * self.args.heads * self.args.head_dim * itemsize
        return self.memory.state_bytes(itemsize) + segment


MODULE = Titans
