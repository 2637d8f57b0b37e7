"""DuoAttention: few heads keep all tokens, the others the first and the last ones (Xiao et al. 2024, arXiv 2410.10819).

    o_g = attention to all tokens                                                   where alpha_g > threshold
          attention to {j < sinks} & {t - window < j <= t},  window = budget - sinks    else

for each KV head g. The gates alpha in [0, 1] are learned on a model whose weights are frozen, attention being
alpha_g full_g + (1 - alpha_g) stream_g (`conversion/core/duo_gates.py`); `calibrate` estimates them without training.
A layer of ours keeps the tokens of the others in a ring, so that their cache does not grow.

B batch, T new tokens, S keys, H query heads, G KV heads, K head dimension, n blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.cache_view import CacheView
from zoo.architectures.core.keys import Keys, all_tokens, recent_tokens
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.sparse import Method, SparseAttention, View
from zoo.architectures.core.streams import StreamArgs, attend_stream, keys_of
from zoo.errors import ZooError
from zoo.kernels.attention import attention

BLOCK = 128  # keys that a list names at once
EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "alphas": (0.0, 0.9), "budget": 1.0}
VARIANTS = {
    "small": {**EXAMPLE, "budget": 6, "sinks": 2},
    "none_full": {**EXAMPLE, "alphas": (0.2, 0.1), "budget": 5, "sinks": 0, "output_gate": True},
}


@dataclass(frozen=True, kw_only=True)
class Args(StreamArgs):
    """`alphas` are the gates of the KV heads (without them, all heads keep all tokens); those above `threshold` keep
    all. `budget` is how many tokens the others keep, `sinks` of them the first ones."""

    budget: Any = 320
    sinks: int = 64
    alphas: tuple[float, ...] | None = None
    threshold: float = 0.5

    def split(self) -> tuple[list[int], list[int]]:
        """The KV heads that keep all tokens, and the others."""
        alphas = self.alphas or (2.0,) * (self.kv_heads or self.heads)
        full = [g for g, alpha in enumerate(alphas) if self.window is None or alpha > self.threshold]
        return full, [g for g in range(len(alphas)) if g not in full]

    def check_method(self) -> None:
        super().check_method()
        kv_heads = self.kv_heads or self.heads
        if self.alphas is not None and not (len(self.alphas) == kv_heads and all(0 <= a <= 1 for a in self.alphas)):
            raise ZooError(f"alphas was {self.alphas!r}; it must be a number of 0 to 1 for each of {kv_heads} KV heads")


class Heads(NamedTuple):
    """Keys of the KV heads that keep all tokens, and of the others; None where there are no such heads."""

    full: Keys | None
    stream: Keys | None


class DuoAttention(Method):
    phases = ("prefill", "decode")
    name = "duo_attention"

    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.split = args.split()
        self.order = [*self.split[0], *self.split[1]]

    def heads(self, x: Tensor, part: int, group: int = 1) -> Tensor:
        """Those of the `group` times G heads of `x [B, T, group G, K]` that belong to a part of the KV heads."""
        return torch.cat([x[:, :, g * group : (g + 1) * group] for g in self.split[part]], 2)

    def joined(self, parts: list[Tensor], group: int) -> Tensor:
        """`[B, T, H, K]` from what the heads of both parts give."""
        o = torch.cat(parts, 2)
        places = [self.order.index(g) for g in range(len(self.order))]
        return torch.cat([o[:, :, at * group : (at + 1) * group] for at in places], 2)

    def attend(self, q: Tensor, keys: Heads, **call: Any) -> Tensor:
        """`[B, T, H, K]`; `call` is for `attention`."""
        group, o = q.shape[2] // len(self.order), []
        masks: tuple[dict[str, Any], ...] = ({}, dict(window=self.args.window, sink_tokens=self.args.sinks))
        for part, (seen, mask) in enumerate(zip(keys, masks, strict=True)):
            if seen is not None:
                places: Any = dict(q_positions=seen.q_positions, k_positions=seen.k_positions)
                o.append(attention(self.heads(q, part, group), seen.k, seen.v, **mask, **places, **call))
        return self.joined(o, group)

    def prefill(self, view: View) -> Tensor:
        keys = keys_of(view)
        parts = (
            keys._replace(k=self.heads(view.k, n), v=self.heads(view.v, n)) if self.split[n] else None for n in (0, 1)
        )
        return self.attend(view.q, Heads(*parts), scale=view.scale, cu_seqlens=view.cu_seqlens)

    def decode(self, view: View) -> Tensor:
        """Without a copy of any key: all blocks are listed for the heads that keep all tokens."""
        if not self.split[1]:
            return self.prefill(view)
        blocks = torch.arange(-(-view.k.shape[1] // BLOCK), dtype=torch.int32, device=view.k.device)
        none = torch.full_like(blocks, -1)
        lists = torch.stack([blocks if g in self.split[0] else none for g in range(len(self.order))])[None, :, None]
        return attend_stream(view, self.args.window, self.args.sinks, lists.expand(view.q.shape[0], -1, -1, -1))[0]


class DuoAttentionMixer(SparseAttention):
    options = Args
    method = DuoAttention
    phase_consistent = True

    def visible(self, x: Tensor, ctx: Context, cache: LayerCache | CacheView | None) -> Any:
        """The keys of both kinds of heads, each in its own part of the cache."""
        new = dict(zip("kv", self.keys_values(x, ctx), strict=True))
        found: list[Keys | None] = []
        for part, name in enumerate(("full", "stream")):
            if not self.rule.split[part]:
                found.append(None)
                continue
            own: Any = None if cache is None else cache.view(name)
            kept = {kind: self.rule.heads(value, part) for kind, value in new.items()}
            if own is None or part == 0:
                seen, q_at, k_at = all_tokens(kept, ctx, own)
            else:
                seen, q_at, k_at = recent_tokens(kept, ctx, own, self.args.window - 1, self.args.sinks)
            found.append(Keys(seen["k"], seen["v"], q_at, k_at))
        return Heads(*found)

    def attend(self, q: Tensor, keys: Any, ctx: Context) -> Tensor:
        backend = "eager" if ctx.eager else None
        o: Tensor = self.rule.attend(q, keys, scale=self.args.scale, cu_seqlens=ctx.cu_seqlens, backend=backend)
        return o

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        full, stream = (len(part) for part in self.rule.split)
        token = (self.head_dim + self.value_dim) * itemsize
        kept = (self.args.window or 1) - 1 + self.args.sinks
        return full * token * length + (kept * (stream * token + torch.int64.itemsize) if stream else 0)


def calibrate(view: View, args: Args) -> dict[str, Any]:
    """Estimates of the gates: how far the output of each KV head's queries is from what it is with few tokens, as a
    share of its size. Learned gates (`duo_gates.train_gates`) know what the model makes of it; these do not."""
    full, group = view.dense().float(), view.q.shape[2] // view.k.shape[2]
    few = view.dense(window=args.window or view.k.shape[1], sink_tokens=args.sinks).float()
    wrong, size = ((x.square().sum((0, 1, 3)).unflatten(0, (-1, group)).sum(1)) for x in (full - few, full))
    return {"alphas": [round(a, 4) for a in (wrong / size).sqrt().clamp(max=1.0).tolist()]}


MODULE = DuoAttentionMixer
