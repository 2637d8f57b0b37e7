"""Where queries and keys lie, read off the mask that transformers gives to attention.

B batch, T new tokens, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Args:
    q_positions: `[B, T]`, consecutive in each row, negative on padding before the first token.
    starts: `[B]`, keys of padding before the first token.
    order: `[B, S]`, the keys in the order of their positions, padding last; None: they lie so already. With it the
        keys of a row begin at position 0.
    """

    q_positions: Tensor
    starts: Tensor | None = None
    order: Tensor | None = None


def places_of(mask: Tensor, batch: int, offset: int | Tensor) -> Places | None:
    """The places behind a mask `[B, 1, T, S]` (boolean or additive) whose first query is key number `offset`.

    None for any mask but that of causal attention with padding. It waits for the device once per mask.
    """
    known = getattr(mask, "_zoo_places", None)
    if known is None:
        known = (_read(mask, batch, offset),)
        mask._zoo_places = known  # type: ignore[attr-defined]  # every layer of a call gets the same mask
    found: Places | None = known[0]
    return found


def _read(mask: Tensor, batch: int, offset: int | Tensor) -> Places | None:
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, batch):
        return None
    seen, hidden = mask, None
    if mask.dtype != torch.bool:
        seen, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min / 2
    seen = seen[:, 0].expand(batch, -1, -1)
    tokens, length = seen.shape[1:]
    numbers = torch.arange(length, device=mask.device)
    own = (torch.arange(tokens, device=mask.device) + offset).clamp(max=length - 1)  # [T], each query among the keys
    keys = seen.any(1)  # [B, S], no padding, and written already
    real = seen.gather(2, own[None, :, None].expand(batch, -1, 1))[..., 0]  # [B, T]
    expected = keys[:, None] & (numbers <= own[:, None])
    first = keys.int().argmax(1)
    counted = keys.long().cumsum(1)
    before = real.int().argmax(1, keepdim=True)  # the first real query of each row
    steps = torch.arange(tokens, device=mask.device)
    moved = counted.gather(1, own[before]) - 1 + steps - before  # positions among the real keys
    causal = ((seen == expected) | ~real[..., None]).all()
    causal &= True if hidden is None else (hidden[:, 0] | (mask[:, 0] == 0)).all()
    consecutive = ((counted[:, own] - 1 == moved) | ~real).all()
    gaps = (counted[:, -1] != (keys * (numbers + 1)).amax(1) - first) & keys.any(1)
    is_causal, is_consecutive, has_gaps = torch.stack([causal, consecutive, gaps.any()]).tolist()
    if not is_causal or not is_consecutive:
        return None
    if has_gaps:
        return Places(moved, order=(~keys).to(torch.uint8).sort(dim=1, stable=True).indices)
    return Places(own - first[:, None], first)
