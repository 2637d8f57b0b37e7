"""RG-LRU and the gated short convolution against their formulas, token by token in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_models import ROPES, WIDTH, same, stir

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context
from zoo.architectures.mixers.rg_lru import STEEPEST, bounded_sqrt

TOKENS = 11


def make(name: str, **args: Any) -> Any:
    cls = registry.get("mixers", name, "MODULE")
    torch.manual_seed(0)
    mixer = cls(DecoderConfig(vocab_size=8, hidden_size=WIDTH, layers=(), ropes=ROPES), cls.parse(args)).double()
    mixer.init_weights(0.02)
    stir(mixer, std=0.2)
    return mixer


def inputs(batch: int = 2) -> tuple[Tensor, Context]:
    x = torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, Context(phase="train", positions=torch.arange(TOKENS).expand(batch, TOKENS))


def convolved(u: Tensor, weight: Tensor, bias: Tensor | float) -> Tensor:
    """`y_t = sum_j weight[:, -1 - j] u_{t-j} + bias`."""
    out = torch.zeros_like(u)
    for t in range(u.shape[1]):
        for j in range(min(t + 1, weight.shape[1])):
            out[:, t] += weight[:, -1 - j] * u[:, t - j]
    return out + bias


def test_gated_short_conv_is_its_formula() -> None:
    mixer = make("gated_short_conv", conv=4, bias=True)
    x, ctx = inputs()
    weight, bias = mixer.in_proj.weight, mixer.in_proj.bias
    before, after, u = ((x @ w.T + b) for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True))
    y = after * convolved(before * u, mixer.convs.u, mixer.convs.u_bias)
    same(mixer(x, ctx), y @ mixer.out_proj.weight.T + mixer.out_proj.bias, 1e-10)


def naive_rg_lru(m: Any, x: Tensor) -> Tensor:
    u = convolved(x @ m.x_proj.weight.T + m.x_proj.bias, m.convs.x, m.convs.x_bias)
    h = torch.zeros_like(u[:, 0])
    outputs = []
    for t in range(x.shape[1]):
        blocks = u[:, t].unflatten(-1, (m.args.heads, -1))
        gates = []
        for gate in (m.input_gate, m.recurrent_gate):
            heads = [blocks[:, k] @ gate.weight[k] + gate.bias[k] for k in range(m.args.heads)]
            gates.append(torch.sigmoid(torch.cat(heads, -1)))
        a = torch.exp(-8 * torch.log1p(m.a_param.exp()) * gates[1])
        scale = torch.ones_like(a) if t == 0 else (1 - a**2).sqrt()
        h = a * h + scale * gates[0] * u[:, t]
        y = x[:, t] @ m.y_proj.weight.T + m.y_proj.bias
        gelu = torch.nn.functional.gelu(y, approximate="tanh" if m.args.tanh else "none")
        outputs.append((gelu * h) @ m.out_proj.weight.T + m.out_proj.bias)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("args", [dict(heads=4, width=96), dict(heads=2, width=32, conv=3, tanh=False)])
def test_rg_lru_is_its_formula(args: dict[str, Any]) -> None:
    mixer = make("rg_lru", **args)
    x, ctx = inputs()
    same(mixer(x, ctx), naive_rg_lru(mixer, x), 1e-10)


def test_rg_lru_starts_with_the_published_decays() -> None:
    cls = registry.get("mixers", "rg_lru", "MODULE")
    mixer = cls(DecoderConfig(vocab_size=8, hidden_size=WIDTH, layers=()), cls.parse(dict(heads=2, width=4096)))
    mixer.init_weights(0.02)
    a = torch.exp(-torch.nn.functional.softplus(mixer.a_param.detach()))
    assert 0.9 <= a.min() < 0.905 and 0.995 < a.max() <= 0.999 + 1e-6
    assert (a.square().mean() - (0.9**2 + 0.999**2) / 2).abs() < 0.01


def test_the_square_root_has_a_bounded_slope() -> None:
    x = torch.tensor([0.0, 1e-9, 2.4e-7, 2.6e-7, 0.01, 1.0], dtype=torch.float64, requires_grad=True)
    y = bounded_sqrt(x)
    torch.testing.assert_close(y, x.sqrt(), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    expected = torch.minimum(0.5 / x.detach().clamp(min=1e-30).sqrt(), torch.tensor(STEEPEST, dtype=x.dtype))
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0)
