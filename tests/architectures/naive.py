"""One mixer in fp64 with stirred weights, its inputs, and pieces of formulas written token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from zoo_models import ROPES, WIDTH, stir

from zoo import registry
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context

ROTATED = ROPES["default"].dim


def make_mixer(name: str, **args: Any) -> Any:
    cls = registry.get("mixers", name, "MODULE")
    torch.manual_seed(0)
    mixer = cls(DecoderConfig(vocab_size=8, hidden_size=WIDTH, layers=(), ropes=ROPES), cls.parse(args)).double()
    for module in mixer.modules():
        if hasattr(module, "init_weights"):
            module.init_weights(0.02)
    stir(mixer, std=0.2)
    return mixer


def inputs(tokens: int = 11, batch: int = 2) -> tuple[Tensor, Context]:
    """`x [batch, tokens, WIDTH]` and a context with the rotary table "default"."""
    x = torch.randn(batch, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(tokens).expand(batch, tokens)
    speeds = 10000.0 ** (-torch.arange(0, ROTATED, 2, dtype=torch.float64) / ROTATED)
    angles = (positions[..., None] * speeds).repeat(1, 1, 2)
    return x, Context(phase="train", positions=positions, ropes={"default": (angles.cos(), angles.sin())})


def in_pieces(mixer: Any, x: Tensor, ctx: Any, sizes: tuple[int, ...]) -> Tensor:
    """The outputs when the input comes in pieces of these sizes, over a cache."""
    cache, outs, begin = LayerCache(), [], 0
    for size in sizes:
        part = slice(begin, begin + size)
        ropes = {name: (cos[:, part], sin[:, part]) for name, (cos, sin) in ctx.ropes.items()}
        phase: Any = "decode" if begin else "prefill"
        with torch.no_grad():
            outs.append(
                mixer(x[:, part], replace(ctx, phase=phase, positions=ctx.positions[:, part], ropes=ropes), cache)
            )
        cache.advance(size)
        begin += size
    return torch.cat(outs, 1)


def linear(x: Tensor, projection: Any) -> Tensor:
    y = x @ projection.weight.T
    return y if projection.bias is None else y + projection.bias


def convolved(u: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """`y_t = sum_j weight[:, -1 - j] u_{t-j} + bias`."""
    out = torch.zeros_like(u)
    for t in range(u.shape[1]):
        for j in range(min(t + 1, weight.shape[1])):
            out[:, t] += weight[:, -1 - j] * u[:, t - j]
    return out + bias


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def rms(x: Tensor, weight: Tensor | float = 1.0, eps: float = 1e-5) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def standardised(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered * (centered.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias
