"""A sparse mixer in fp64, fed in pieces, and what it must give by the keys that each head may read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from zoo_models import ROPES, stir

from zoo import registry
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context, Mixer
from zoo.architectures.core.rope import RotaryTable

CONFIG = DecoderConfig(vocab_size=97, hidden_size=64, layers=(), ropes=ROPES)
BASE: dict[str, Any] = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"}
T, PROMPT = 75, 50
ROUNDED = 3e-6  # rotation is by tables in fp32
Sets = Callable[[Tensor, Tensor, Any, int], list[set[int]]]  # q [H, K] and keys [t + 1, G, K] to the keys of each head


def build(name: str, std: float = 0.3, **args: Any) -> Mixer:
    cls = registry.get("mixers", name, "MODULE")
    parsed = cls.parse(BASE | args)
    parsed.check(CONFIG)
    module: Mixer = cls(CONFIG, parsed).double()
    stir(module, std=std)
    return module.eval()


def inputs(rows: int = 2) -> Tensor:
    return torch.randn(rows, T, 64, generator=torch.Generator().manual_seed(3)).double()


def context(positions: Tensor, phase: Any = "train", **facts: Any) -> Context:
    ropes = {name: RotaryTable(rope, 2048)(positions) for name, rope in ROPES.items()}
    return Context(phase=phase, positions=positions, ropes=ropes, **facts)


def cached(module: Mixer, x: Tensor, sizes: Sequence[int], static: bool = False, pads: int = 0) -> Tensor:
    """`x` fed in pieces; the first row begins with `pads` tokens of padding."""
    cache, outs, start = LayerCache(max_cache_len=T + 7 if static else None), [], 0
    cache.padded = pads > 0
    for size in sizes:
        at = torch.arange(start, start + size).repeat(x.shape[0], 1)
        at[0] -= pads
        mask = at >= 0 if pads else None
        ctx = context(at.clamp(min=0), "decode" if cache.started else "prefill", padding_mask=mask)
        with torch.no_grad():
            y = module(x[:, start : start + size], ctx, cache)
        outs.append(y)
        cache.advance(size)
        start += size
    return torch.cat(outs, 1)


def attended(q: Tensor, k: Tensor, v: Tensor, seen: Sequence[set[int]]) -> Tensor:
    """One query `[H, K]` over the keys of each head, `[H, V]`."""
    rows = []
    for h, own in enumerate(seen):
        index, g = sorted(own), h // (q.shape[0] // k.shape[1])
        weights = torch.softmax(k[index, g] @ q[h] * q.shape[1] ** -0.5, 0)
        rows.append(weights @ v[index, g])
    return torch.stack(rows)


def projected(module: Mixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[T, H, K]`, keys and values `[T, G, K]` of one row."""
    ctx = context(torch.arange(x.shape[0])[None])
    with torch.no_grad():
        q = module.queries(x[None], ctx)[0][0]  # type: ignore[operator]
        k, v = (part[0] for part in module.keys_values(x[None], ctx))  # type: ignore[operator]
    return q, k, v


def decoded(module: Mixer, x: Tensor, sets: Sets, first: int) -> Tensor:
    """What the tokens of `x [T, D]` from `first` on must give."""
    q, k, v = projected(module, x)
    rows = [
        attended(q[t], k[: t + 1], v[: t + 1], sets(q[t], k[: t + 1], module.args, t)) for t in range(first, len(q))
    ]
    with torch.no_grad():
        return module.get_submodule("o_proj")(torch.stack(rows).flatten(1))
