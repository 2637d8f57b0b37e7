"""Multi-head latent attention: the paper's formula, decoding without expanding the cache, and the size of the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from zoo_models import draw, feed, forward, make, same

from zoo.architectures.core.config import DecoderConfig, Layer, Rope
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.architectures.mixers.mla import EXAMPLE, VARIANTS, LatentAttention

WIDTH, T = 20, 9
CASES = {"plain": EXAMPLE, **VARIANTS, "odd": {**EXAMPLE, "heads": 3, "value_dim": 5, "nope_dim": 7, "kv_rank": 11}}


def config_of(args: dict[str, Any], depth: int = 1, pairing: str = "half") -> DecoderConfig:
    layers = (Layer(mixer="mla", mixer_args=args),) * depth
    return DecoderConfig(
        vocab_size=97, hidden_size=WIDTH, layers=layers, ropes={"default": Rope(dim=16, pairing=pairing)}
    )


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def rotate(x: Tensor, position: int, pairing: str) -> Tensor:
    """Each pair of channels as a complex number, turned by `position / 10000^(2i / P)`."""
    angles = position / 10000 ** (torch.arange(0, len(x), 2).double() / len(x))
    half = len(x) // 2
    first, second = (x[:half], x[half:]) if pairing == "half" else (x[::2], x[1::2])
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    if pairing == "half":
        return torch.cat([turned.real, turned.imag])
    return torch.stack([turned.real, turned.imag], -1).flatten()


def naive(layer: LatentAttention, x: Tensor, pairing: str) -> Tensor:
    """The layer's output `[T, D]` for `x [T, D]`, token by token and head by head."""
    a, w = layer.args, dict(layer.named_parameters())
    queries, keys, values = [], [], []
    turn = (lambda y, t: rotate(y, t, pairing)) if a.rope else (lambda y, t: y)
    for t, token in enumerate(x):
        if a.q_rank is None:
            q = w["q_proj.weight"] @ token
        else:
            low = w["q_down.weight"] @ token + w.get("q_down.bias", 0)
            q = w["q_up.weight"] @ rms(low, w["q_norm.weight"])
        down = w["kv_down.weight"] @ token + w.get("kv_down.bias", 0)
        latent, shared = rms(down[: a.kv_rank], w["kv_norm.weight"]), turn(down[a.kv_rank :], t)
        up = (w["kv_up.weight"] @ latent).view(a.heads, a.nope_dim + a.value_dim)
        q = q.view(a.heads, a.nope_dim + a.rope_dim)
        queries.append([torch.cat([row[: a.nope_dim], turn(row[a.nope_dim :], t)]) for row in q])
        keys.append([torch.cat([row[: a.nope_dim], shared]) for row in up])
        values.append([row[a.nope_dim :] for row in up])
    scale = a.scale or (a.nope_dim + a.rope_dim) ** -0.5
    outs = []
    for t in range(len(x)):
        heads = []
        for h in range(a.heads):
            scores = torch.stack([scale * queries[t][h] @ keys[s][h] for s in range(t + 1)])
            heads.append(scores.softmax(0) @ torch.stack([values[s][h] for s in range(t + 1)]))
        outs.append(w["o_proj.weight"] @ torch.cat(heads) + w.get("o_proj.bias", 0))
    return torch.stack(outs)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_published_formula(name: str, pairing: str) -> None:
    config = config_of(CASES[name], pairing=pairing)
    model = make(ZooConfig.from_decoder(config, "test")).double()
    layer = model.model.layers[0].mixer
    x = torch.randn(1, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(T)[None]
    ropes = {name: table(positions) for name, table in model.model.ropes.items()}
    with torch.no_grad():
        found = layer(x, Context(phase="train", positions=positions, ropes=ropes))
        expected = naive(layer, x[0], pairing)
    same(found[0], expected, 1e-6)  # rotary tables are fp32


@pytest.mark.parametrize("name", CASES)
def test_decoding_in_the_latent_space_is_decoding_expanded_keys(name: str) -> None:
    ids, models = draw(2, T), []
    for absorb in (True, False):
        config = config_of({**CASES[name], "absorb": absorb}, depth=2)
        models.append(make(ZooConfig.from_decoder(config, "test")).double())
    folded, expanded = (feed(model, ids, [4, *[1] * (T - 4)])[0] for model in models)
    same(folded, expanded, 1e-12)
    same(folded, forward(models[0], ids), 1e-12)


def test_the_cache_holds_one_latent_and_one_key_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = make(ZooConfig.from_decoder(config_of(EXAMPLE), "test")), DynamicCache()
    feed(model, draw(2, T), [4, *[1] * (T - 4)], cache=cache)
    layer = model.model.layers[0].mixer
    held = cache.layers[0].bytes()
    assert held == {"latent": 2 * T * 24 * 4, "shared": 2 * T * 16 * 4}
    assert sum(held.values()) == 2 * layer.state_bytes(T, itemsize=4)
    grown: list[int] = []
    monkeypatch.setattr(layer.kv_up, "forward", lambda x: grown.append(x.shape[1]) or x @ layer.kv_up.weight.T)
    feed(model, draw(2, 1), [1], cache=cache)
    assert T + 1 not in grown, "a decoded token expanded the whole cache"
