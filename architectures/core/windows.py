"""Windows of tokens that end as a text goes on, and what is kept of each: compressed keys, core tokens, gate keys.

Window i holds the tokens i * stride .. i * stride + size - 1 of its sequence. It makes one entry when its last token is
there, so that an entry never changes and a query sees it from then on.

B batch, T new tokens, C tokens of a window, M windows that end in a call, N entries, H query heads, G KV heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.mixer import Context, along
from zoo.architectures.core.rope import RotaryTable
from zoo.kernels import checks
from zoo.kernels.attention import attention


@dataclass(frozen=True)
class Windows:
    """The windows that end in a call.

    Args:
        tokens: by name what `new` says of their tokens, each `[B, M, C, ...]`.
        index: `[M]` or `[B, M]`, their numbers in their sequences.
        last: `[B, M]`, the call's token that is the last of each.
        real: `[B, M]`, whether there is such a window; None: all are.
    """

    size: int
    stride: int
    tokens: dict[str, Tensor]
    index: Tensor
    last: Tensor
    real: Tensor | None = None

    def at_last(self, x: Tensor) -> Tensor:
        """Of `x [B, T, ...]` the windows' last tokens, `[B, M, ...]`."""
        return along(x, self.last)

    def rotated_at(self, place: int, table: RotaryTable, name: str, ctx: Context) -> Context:
        """`ctx` with the rotary table `name` at token `place` of each window."""
        positions = (self.index * self.stride + place).expand(self.last.shape)
        return replace(ctx, ropes={name: turns(table, positions)})


def turns(table: RotaryTable, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin at `positions [B, M]`, where M may be 0."""
    if positions.shape[1]:
        return table(positions)
    cos, sin = table(positions.new_zeros(positions.shape[0], 1))
    return cos[:, :0], sin[:, :0]


def count(length: int, size: int, stride: int) -> int:
    """Windows that have ended among `length` tokens."""
    return max(0, (length - size) // stride + 1)


def ended(new: dict[str, Tensor], ctx: Context, cache: LayerCache | None, size: int, stride: int) -> Windows:
    """The windows that end in this call, of whose tokens `new` has the call's, each `[B, T, ...]`.

    The cache holds the last size - 1 tokens for the next call.
    """
    if even(ctx, cache):
        return _together(new, cache, size, stride)
    return _by_row(new, ctx, cache, size, stride)


def even(ctx: Context, cache: LayerCache | None) -> bool:
    """Whether all rows have the same number of tokens, which is known on the host."""
    return ctx.padding_mask is None and (cache is None or not (cache.static or cache.padded))


def _together(new: dict[str, Tensor], cache: LayerCache | None, size: int, stride: int) -> Windows:
    (b, t), device = next(iter(new.values())).shape[:2], next(iter(new.values())).device
    seen = 0 if cache is None else int(cache.cumulative_length)
    begin, end = count(seen, size, stride), count(seen + t, size, stride)
    tokens = {}
    for name, x in new.items():
        held = _held(name, x, cache, size)
        if cache is not None:
            cache.put(f"{name}_last", held[:, t:], "ring")
        first = begin * stride - seen + size - 1
        part = held[:, first : first + (end - begin - 1) * stride + size]
        none = x.new_zeros(b, 0, size, *x.shape[2:])
        tokens[name] = part.unfold(1, size, stride).movedim(-1, 2) if end > begin else none
    index = torch.arange(begin, end, device=device)
    return Windows(size, stride, tokens, index, (index * stride + size - 1 - seen).expand(b, -1))


def _held(name: str, x: Tensor, cache: LayerCache | None, size: int) -> Tensor:
    """`[B, size - 1 + T, ...]`: the last tokens of earlier calls and the new ones."""
    shape = (x.shape[0], size - 1, *x.shape[2:])
    old = x.new_zeros(shape) if cache is None else cache.state(f"{name}_last", shape, x.dtype, "ring", x.device)
    return torch.cat([old, x], 1)


def _by_row(new: dict[str, Tensor], ctx: Context, cache: LayerCache | None, size: int, stride: int) -> Windows:
    """Where padding or a static buffer makes rows differ: as many windows as can end, some of them not real."""
    b, t = ctx.positions.shape
    device = ctx.positions.device
    mask = ctx.positions >= 0 if ctx.padding_mask is None else ctx.padding_mask
    order, known = (~mask).int().argsort(dim=1, stable=True), mask.sum(1, keepdim=True)  # real tokens first
    before = ctx.positions.gather(1, order[:, :1])  # [B, 1], the first new token's position
    first = -torch.div(size - 1 - before, stride, rounding_mode="floor")
    index = first.clamp(min=0) + torch.arange(-(-t // stride), device=device)
    end = index * stride + size - 1
    places = ((index * stride - before)[..., None] + torch.arange(size, device=device) + size - 1).flatten(1)
    places, kept = places.clamp(0, t + size - 2), known + torch.arange(size - 1, device=device)
    tokens = {}
    for name, x in new.items():
        held = _held(name, along(x, order), cache, size)
        if cache is not None:
            cache.put(f"{name}_last", along(held, kept), "ring")
        tokens[name] = along(held, places).unflatten(1, (-1, size))
    last = order.gather(1, (end - before).clamp(0, t - 1))
    return Windows(size, stride, tokens, index, last, end < before + known)


def entries(name: str, new: Tensor, found: Windows, ctx: Context, cache: LayerCache | None) -> Tensor:
    """All entries so far `[B, N, ...]`, from those of the windows that end now, `new [B, M, ...]`.

    Entry i is that of window i; where a row's window has not ended, no query sees it.
    """
    if cache is None:
        return new
    if found.real is None:
        old = cache.get(name)
        if new.shape[1] or old is None:
            return cache.append(name, new)
        return old
    size, stride, spare = found.size, found.stride, new[:, :1]
    limit = cache.max_cache_len if cache.static else int(cache.cumulative_length) + ctx.positions.shape[1]
    total = count(limit or 0, size, stride)
    index = torch.where(found.real, found.index, total).view(*found.real.shape, *[1] * (new.dim() - 2)).expand_as(new)
    if cache.static:  # one place more, for windows that have not ended
        shape = (new.shape[0], total + 1, *new.shape[2:])
        kept = cache.state(name, shape, new.dtype, "recurrent", new.device)
        kept.scatter_(1, index, new)
        return kept[:, :total]
    old = cache.get(name)
    grown = spare.new_zeros(new.shape[0], total + 1 - (0 if old is None else old.shape[1]), *new.shape[2:])
    grown = grown if old is None else torch.cat([old, grown], 1)
    cache.put(name, grown.scatter(1, index, new)[:, :total], "recurrent")
    return cache.get(name)  # type: ignore[return-value]


def attend_entries(
    q: Tensor, k: Tensor, v: Tensor, ctx: Context, size: int, stride: int, scale: float | None, delay: int = 0
) -> tuple[Tensor, Tensor]:
    """`o [B, T, H, V]` and `lse [B, T, H]` of attention to entries `[B, N, G, K]`, each seen from its window's last
    token on, or `delay` tokens after it."""
    if not k.shape[1]:
        blind = q.new_full(q.shape[:3], -torch.inf, dtype=checks.state_dtype(q.dtype))
        return q.new_zeros(*q.shape[:3], v.shape[3]), blind
    ends = torch.arange(k.shape[1], device=k.device) * stride + size - 1 + delay
    at = ctx.positions.expand(q.shape[:2])
    o, lse = attention(q, k, v, q_positions=at, k_positions=ends, scale=scale, return_lse=True)
    return o, lse


def sequences(forward: Callable[[Tensor, Context], Any], x: Tensor, ctx: Context) -> Tensor:
    """`forward(x, ctx)` of each packed sequence as of one alone, side by side `[1, T, D]`."""
    assert ctx.cu_seqlens is not None
    parts = []
    for begin, end in pairwise(checks.host_values(ctx.cu_seqlens)):
        if begin < end:
            part = slice(begin, end)
            ropes = {name: (cos[:, part], sin[:, part]) for name, (cos, sin) in ctx.ropes.items()}
            alone = dict(positions=ctx.positions[:, part], ropes=ropes, cu_seqlens=None, max_seqlen=None, values={})
            parts.append(forward(x[:, part], replace(ctx, **alone)))  # type: ignore[arg-type]
    return torch.cat(parts, 1) if parts else torch.zeros_like(x)
