"""Kimi Delta Attention against the paper's recurrence, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zoo_models import make, same

from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.architectures.mixers.kimi_delta import EXAMPLE, VARIANTS, KimiDelta

WIDTH, T = 20, 11
CASES = {
    "plain": EXAMPLE,
    **VARIANTS,
    "bare": {"heads": 3, "head_dim": 5, "conv": 0, "conv_activation": None, "gate": "silu", "norm_eps": 1e-3},
}


def convolved(x: Tensor, weight: Tensor | None, silu: bool) -> Tensor:
    """Each channel of `x [T, C]` as a weighted sum of its last inputs."""
    if weight is not None:
        width = weight.shape[1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        x = torch.stack([(padded[t : t + width].T * weight).sum(-1) for t in range(len(x))])
    return F.silu(x) if silu else x


def naive(layer: KimiDelta, x: Tensor) -> Tensor:
    """The layer's output `[T, D]` for `x [T, D]`."""
    a, w = layer.args, dict(layer.named_parameters())
    keys, values = a.head_dim, a.value_dim or a.head_dim
    parts = (convolved(x @ w[f"{n}_proj.weight"].T, w.get(f"convs.{n}"), a.conv_activation == "silu") for n in "qkv")
    q, k, v = (part.view(T, a.heads, -1) for part in parts)
    steps = F.softplus(x @ w["decay_down.weight"].T @ w["decay_up.weight"].T + w["dt_bias"].double())
    forget = torch.exp(-w["A_log"].double().exp()[:, None] * steps.view(T, a.heads, keys))
    beta = a.beta_scale * torch.sigmoid(x @ w["b_proj.weight"].T)
    gate = (x @ w["gate_down.weight"].T @ w["gate_up.weight"].T).view(T, a.heads, values)
    gate = torch.sigmoid(gate) if a.gate == "sigmoid" else F.silu(gate)
    state, outs = torch.zeros(a.heads, keys, values, dtype=x.dtype), []
    for t in range(T):
        heads = []
        for h in range(a.heads):
            unit_q, unit_k = (y / (y.square().sum() + 1e-6).sqrt() for y in (q[t, h], k[t, h]))
            decayed = forget[t, h][:, None] * state[h]
            state[h] = decayed + torch.outer(unit_k, beta[t, h] * (v[t, h] - unit_k @ decayed))
            o = keys**-0.5 * unit_q @ state[h]
            heads.append(o / (o.square().mean() + a.norm_eps).sqrt() * w["o_norm"] * gate[t, h])
        outs.append(w["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(outs)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_published_recurrence(name: str) -> None:
    args: dict[str, Any] = CASES[name]
    layers = (Layer(mixer="kimi_delta", mixer_args=args),)
    config = DecoderConfig(vocab_size=97, hidden_size=WIDTH, layers=layers)
    layer = make(ZooConfig.from_decoder(config, "test")).double().model.layers[0].mixer
    with torch.no_grad():
        for parameter in layer.parameters():  # large enough that gates and decays matter
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    x = torch.randn(1, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = layer(x, Context(phase="train", positions=torch.arange(T)[None]))
        same(found[0], naive(layer, x[0]), 1e-10)
