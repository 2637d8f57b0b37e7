"""The keys and values that softmax attention keeps: of all tokens, or of those that can still be seen.

B batch, T new tokens, S keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.architectures.core.cache import UNSEEN, LayerCache
from zoo.architectures.core.mixer import Context

Kept = tuple[dict[str, Tensor], Tensor | None, Tensor | None]


class Keys(NamedTuple):
    """`k, v [B, S, G, K]`, the new tokens last, and the positions of queries `[B, T]` and keys `[B, S]` where their
    order alone does not tell what is visible; the cache that holds them, where a mixer needs it."""

    k: Tensor
    v: Tensor
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    cache: LayerCache | None = None


def key_positions(ctx: Context) -> Tensor:
    """`[B, T]` positions of the new keys; padding gets one that no query sees."""
    if ctx.padding_mask is None:
        return ctx.positions
    return torch.where(ctx.padding_mask, ctx.positions, UNSEEN)


def all_tokens(new: dict[str, Tensor], ctx: Context, cache: LayerCache | None) -> Kept:
    """What is kept of every token, `new` (each `[B, T, ...]`) at the end, and the positions of queries and keys where
    their order alone does not tell what is visible."""
    positions = key_positions(ctx)
    if cache is None:
        return new, *((None, None) if ctx.padding_mask is None else (ctx.positions, positions))
    old = cache.get(next(iter(new)))
    seen = {name: cache.append(name, x) for name, x in new.items()}
    if not cache.static and not cache.padded:
        return seen, None, None
    if old is not None and cache.get("positions") is None:
        cache.append("positions", torch.arange(old.shape[1], device=old.device).expand(old.shape[:2]))
    return seen, ctx.positions, cache.append("positions", positions, fill=UNSEEN)


def recent_tokens(new: dict[str, Tensor], ctx: Context, cache: LayerCache, recent: int, sinks: int = 0) -> Kept:
    """As `all_tokens`, but only the `recent` last tokens and the first `sinks` ones are kept for the next call."""
    fresh = not cache.started and not cache.static and ctx.padding_mask is None
    held = {}
    for name, x in (new | {"positions": key_positions(ctx)}).items():
        fill = UNSEEN if name == "positions" else 0
        shape = (x.shape[0], recent + sinks, *x.shape[2:])
        old = cache.state(name, shape, x.dtype, "ring", x.device, fill)
        held[name] = torch.cat([old, x], dim=1)
    for name, kept in keep_ring(held, sinks, recent).items():
        cache.put(name, kept, "ring")
    if fresh:
        return new, None, None
    positions = held.pop("positions")
    return held, ctx.positions, positions


def keep_ring(held: dict[str, Tensor], sinks: int, recent: int) -> dict[str, Tensor]:
    """What a windowed layer keeps: the keys at positions below `sinks`, each in its slot, then the `recent` last ones.

    `held` has old sinks, old recent and new tokens, in this order, along dim 1.
    """
    total = held["positions"].shape[1]
    last = {name: x[:, total - recent :] for name, x in held.items()}
    if not sinks:
        return last
    slots = torch.arange(sinks, device=held["positions"].device)
    match = held["positions"][:, None, :] == slots[None, :, None]  # [B, sinks, S]
    still_recent = (last["positions"][:, None, :] == slots[None, :, None]).any(-1)
    index, found = match.int().argmax(-1), match.any(-1) & ~still_recent  # a key is held once
    kept = {}
    for name, x in held.items():
        shape = (*index.shape, *[1] * (x.dim() - 2))
        chosen = torch.gather(x, 1, index.view(shape).expand(*index.shape, *x.shape[2:]))
        missing = UNSEEN if name == "positions" else 0
        kept[name] = torch.cat([chosen.masked_fill(~found.view(shape), missing), last[name]], dim=1)
    return kept


def shared_names(name: str) -> tuple[str, ...]:
    """The values by which a layer hands its visible keys on under `name`; positions only where there are some."""
    return f"{name}.k", f"{name}.v", f"{name}.positions"


def to_values(name: str, keys: Keys) -> dict[str, Tensor]:
    """`keys` as values for later layers."""
    found = zip(shared_names(name), (keys.k, keys.v, keys.k_positions), strict=True)
    return {value: tensor for value, tensor in found if tensor is not None}


def from_values(name: str, ctx: Context) -> Keys:
    """What an earlier layer handed on under `name`, for the queries of this call."""
    k, v, positions = (ctx.values.get(value) for value in shared_names(name))
    if k is None or v is None:
        raise RuntimeError(f"no layer wrote {name!r} in this call")
    return Keys(k, v, None if positions is None else ctx.positions, positions)
