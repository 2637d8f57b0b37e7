"""Attention in torch: scaled_dot_product_attention wherever it can express the call, blocks of queries otherwise.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K and V head widths.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.attention.mask import Mask, owners, positions
from zoo.kernels.attention.reference import weigh
from zoo.kernels.checks import host_values, state_dtype, values_readable

BLOCK = 256  # queries per block where scores are formed explicitly
MASK_LIMIT = 1 << 24  # elements of a boolean mask beyond which queries go in blocks


def supports(*args: object) -> str | None:
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    sink_logits: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    softcap: float | None,
    scale: float,
    return_lse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    extra = (sink_logits, softcap, scale, return_lse)
    if cu_seqlens is not None and values_readable(cu_seqlens):
        return _each_sequence(q, k, v, mask, q_positions, k_positions, cu_seqlens, extra)
    default = q_positions is None and k_positions is None and cu_seqlens is None
    plain = sink_logits is None and softcap is None and not return_lse
    if default and plain:
        o = _structured(q, k, v, mask, scale)
        if o is not None:
            return o, None
    q_positions, k_positions = positions(q, k, q_positions, k_positions, cu_seqlens)
    return _blocks(q, k, v, mask, q_positions, k_positions, cu_seqlens, extra, plain)


def _each_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    cu_seqlens: Tensor,
    extra: tuple[Tensor | None, float | None, float, bool],
) -> tuple[Tensor, Tensor | None]:
    """One packed sequence after the other; reads the boundaries on the host, once per tensor."""
    ends = host_values(cu_seqlens)
    outputs = [q.new_zeros(*q.shape[:3], v.shape[-1])[:, :0]]
    norms = [q.new_zeros(q.shape[:3], dtype=state_dtype(q.dtype))[:, :0]]
    for begin, end in zip(ends, ends[1:], strict=False):
        if begin < end:
            part = slice(begin, end)
            at = [None if x is None else x[..., part] for x in (q_positions, k_positions)]
            sink, softcap, scale, return_lse = extra
            o, lse = run(q[:, part], k[:, part], v[:, part], mask, sink, at[0], at[1], softcap, scale, return_lse, None)
            outputs.append(o)
            norms += [] if lse is None else [lse]
    return torch.cat(outputs, 1), torch.cat(norms, 1) if extra[3] else None


def _structured(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor | None:
    """Calls at default positions that need no mask, or one far smaller than [Tq, Tk]; None when this is not one."""
    tq, tk = q.shape[1], k.shape[1]
    reach = mask.window is not None and mask.window < tk and mask.dilation is None
    window_covers = mask == Mask(mask.causal, mask.window, mask.sink_tokens) and not reach and tq <= tk
    if not mask.local or window_covers:
        if not mask.causal or tq == 1:
            return _sdpa(q, k, v, None, scale)
        return _sdpa(q, k, v, "causal", scale) if tq == tk else None
    only_window = mask.chunk is None and mask.stride is None and mask.causal
    if reach and only_window and tq == tk and tk > 2 * (mask.window or 0):
        return _windowed(q, k, v, mask, scale)
    return None


def _windowed(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """Blocks of queries against their own block of keys, the one before, and the sink tokens: no [T, T] mask."""
    (b, t), size, sinks = q.shape[:2], max(mask.window or 1, 64), mask.sink_tokens
    count = -(-t // size)
    pad = count * size - t
    q = F.pad(q, [0, 0, 0, 0, 0, pad]).unflatten(1, (count, size)).flatten(0, 1)
    first, then = (_with_previous(x, count, size, pad, min(sinks, t)) for x in (k, v))
    place = torch.arange(count * size, device=q.device).view(count, size)
    keys = torch.cat([place - size, place], 1)
    seen = dataclasses.replace(mask, sink_tokens=0).visible(place, keys) & (keys >= 0)[:, None]
    if sinks:
        head = torch.arange(min(sinks, t), device=q.device)
        far = (head[None, None] <= place[..., None] - (mask.window or 0)).expand(count, size, -1)
        seen = torch.cat([far, seen], -1)
    seen = seen[None].expand(b, -1, -1, -1).flatten(0, 1)
    return _sdpa(q, first, then, seen, scale).unflatten(0, (b, count)).flatten(1, 2)[:, :t]


def _with_previous(x: Tensor, count: int, size: int, pad: int, sinks: int) -> Tensor:
    """[B, T, H, D] to [B count, sinks + 2 size, H, D]: each block behind the sink tokens and the block before it."""
    blocks = F.pad(x, [0, 0, 0, 0, size, pad]).unflatten(1, (count + 1, size))
    head = x[:, None, :sinks].expand(-1, count, -1, -1, -1)
    return torch.cat([head, blocks[:, :-1], blocks[:, 1:]], 2).flatten(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | str | None, scale: float) -> Tensor:
    """seen: None, "causal" or a mask [B or 1, Tq, Tk] whose rows all see something."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = seen[:, None] if isinstance(seen, Tensor) else None
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and bias is not None:  # torch's memory-saving kernels take a mask or groups, not both
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=isinstance(seen, str), scale=scale, enable_gqa=groups > 1
    )
    return o.transpose(1, 2)


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    q_positions: Tensor,
    k_positions: Tensor,
    cu_seqlens: Tensor | None,
    extra: tuple[Tensor | None, float | None, float, bool],
    plain: bool,
) -> tuple[Tensor, Tensor | None]:
    """Masks from positions, for blocks of queries where the whole mask or the scores would be large."""
    q_positions, k_positions = torch.atleast_2d(q_positions), torch.atleast_2d(k_positions)
    owner = None if cu_seqlens is None else owners(cu_seqlens, k.shape[1])
    whole = plain and max(q_positions.shape[0], k_positions.shape[0]) * q.shape[1] * k.shape[1] <= MASK_LIMIT
    outputs, norms = [], []
    for begin in range(0, q.shape[1], q.shape[1] if whole else BLOCK):
        part = slice(begin, q.shape[1] if whole else begin + BLOCK)
        seen = mask.visible(q_positions[:, part], k_positions)
        if owner is not None:
            seen = seen & (owner[part, None] == owner)
        o, lse = _masked_sdpa(q[:, part], k, v, seen, extra) if plain else _explicit(q[:, part], k, v, seen, extra)
        outputs.append(o)
        norms += [] if lse is None else [lse]
    return torch.cat(outputs, 1), torch.cat(norms, 1) if norms else None


def _masked_sdpa(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, extra: tuple[Tensor | None, float | None, float, bool]
) -> tuple[Tensor, None]:
    # Some of torch's kernels give NaN for a row without keys: let it see all of them and drop the result.
    blind = ~seen.any(-1)
    o = _sdpa(q, k, v, seen | blind[..., None], extra[2])
    return o.masked_fill(blind[..., None, None], 0.0), None


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, extra: tuple[Tensor | None, float | None, float, bool]
) -> tuple[Tensor, Tensor]:
    sink_logits, softcap, scale, _ = extra
    dtype, groups = state_dtype(q.dtype), q.shape[2] // k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        q_, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        scores = scale * (q_ @ k.mT)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        o, lse = weigh(scores, seen[:, None], v, sink_logits)
    return o.transpose(1, 2).to(q.dtype), lse.transpose(1, 2)
