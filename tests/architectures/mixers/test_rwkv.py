"""RWKV's mixers and channel against the papers' formulas, token by token in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_models import draw as ids
from zoo_models import feed, make, same, stir

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context

D, T = 12, 20
HEADS: dict[str, Any] = {"heads": 3, "head_dim": 5, "norm_eps": 1e-3}
RANKS = {"decay_rank": 4, "rate_rank": 3, "value_rank": 2, "gate_rank": 5}
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rwkv4": ("rwkv4", {"attention_size": 10, "layer_index": 1, "depth": 3}),
    "rwkv5": ("rwkv5", {**HEADS, "layer_index": 1, "depth": 3}),
    "rwkv6": ("rwkv6", {**HEADS, "mix_rank": 2, "decay_rank": 4}),
    "rwkv7": ("rwkv7", {**HEADS, **RANKS}),
    "rwkv7/later": ("rwkv7", {**HEADS, **RANKS, "first_value": "read", "layer_index": 1, "depth": 3}),
}
CHANNELS: dict[str, dict[str, Any]] = {
    "4 and 5": {"intermediate_size": 18},
    "6": {"intermediate_size": 18, "weighs": "before"},
    "7": {"intermediate_size": 18, "weighs": "before", "gate": False},
}


def built(kind: str, name: str, args: dict[str, Any]) -> Any:
    """A part with random parameters in fp64."""
    torch.manual_seed(0)
    cls = registry.get(kind, name, "MODULE")
    part = cls(DecoderConfig(vocab_size=8, hidden_size=D, layers=()), cls.parse(args)).double()
    part.init_weights(0.02)
    stir(part, std=0.3)
    return part


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shifted(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def head_norm(o: Tensor, part: Any) -> Tensor:
    rows = [(row - row.mean()) / (row.var(unbiased=False) + HEADS["norm_eps"]).sqrt() for row in o]
    return torch.cat(rows) * part.norm_weight + part.norm_bias


def rwkv4(part: Any, x: Tensor, _: Tensor) -> Tensor:
    r, k, v = (
        getattr(part, f"{n}_proj")(mu * x + (1 - mu) * shifted(x))
        for n, mu in (("r", part.mix_r), ("k", part.mix_k), ("v", part.mix_v))
    )
    w, u, rows = part.time_decay.exp(), part.time_first, []
    for t in range(T):
        weights = [(-(t - 1 - i) * w + k[i]).exp() for i in range(t)] + [(u + k[t]).exp()]
        average = sum(a * b for a, b in zip(weights, v, strict=False)) / sum(weights)
        rows.append(torch.sigmoid(r[t]) * average)
    return part.o_proj(torch.stack(rows))


def rwkv5(part: Any, x: Tensor, _: Tensor) -> Tensor:
    inputs = {n: (mu := getattr(part, f"mix_{n}")) * x + (1 - mu) * shifted(x) for n in "rkvg"}
    return matrix_memory(part, inputs, torch.exp(-torch.exp(part.time_decay)).expand(T, -1, -1))


def rwkv6(part: Any, x: Tensor, _: Tensor) -> Tensor:
    step = shifted(x) - x
    hidden = torch.tanh(part.mix_down(x + step * part.mix_x)).view(T, 5, -1)
    inputs = {
        n: x + step * (getattr(part, f"mix_{n}") + hidden[:, row] @ part.mix_up[row].T) for row, n in enumerate("wkvrg")
    }
    low = part.decay_map.offset + part.decay_map.up(torch.tanh(part.decay_map.down(inputs["w"])))
    return matrix_memory(part, inputs, torch.exp(-torch.exp(low)).view(T, 3, 5))


def matrix_memory(part: Any, inputs: dict[str, Tensor], decay: Tensor) -> Tensor:
    r, k, v = (getattr(part, f"{n}_proj")(inputs[n]).view(T, 3, 5) for n in "rkv")
    state, rows = [torch.zeros(5, 5).double() for _ in range(3)], []
    for t in range(T):
        o = []
        for h in range(3):
            new = torch.outer(k[t, h], v[t, h])
            o.append(r[t, h] @ (state[h] + torch.diag(part.bonus[h]) @ new))
            state[h] = torch.diag(decay[t, h]) @ state[h] + new
        rows.append(head_norm(torch.stack(o), part))
    return part.o_proj(nn.functional.silu(part.g_proj(inputs["g"])) * torch.stack(rows))


def rwkv7(part: Any, x: Tensor, first: Tensor) -> Tensor:
    inputs = {n: x + (shifted(x) - x) * mu for n, mu in zip("rwkvag", part.mix, strict=True)}
    low = {n: getattr(part, f"{m}_map") for n, m in (("w", "decay"), ("a", "rate"), ("g", "gate"))}
    r, k, v = (getattr(part, f"{n}_proj")(inputs[n]) for n in "rkv")
    w = torch.exp(
        -math.exp(-0.5) * torch.sigmoid(low["w"].up(torch.tanh(low["w"].down(inputs["w"]))) + low["w"].offset)
    )
    eta = torch.sigmoid(low["a"].up(low["a"].down(inputs["a"])) + low["a"].offset)
    g = low["g"].up(torch.sigmoid(low["g"].down(inputs["g"])))
    if part.args.first_value == "read":
        share = torch.sigmoid(part.value_map.up(part.value_map.down(inputs["v"])) + part.value_map.offset)
        v = v + (first - v) * share
    kappa = k * part.erase_scale
    k = k * (1 + (eta - 1) * part.rate_scale)
    state, rows = [torch.zeros(5, 5).double() for _ in range(3)], []  # values by keys, as in the paper
    for t in range(T):
        o, extra = [], []
        for h, at in enumerate(slice(5 * h, 5 * h + 5) for h in range(3)):
            unit = kappa[t, at] / kappa[t, at].norm()
            change = torch.diag(w[t, at]) - torch.outer(unit, eta[t, at] * unit)
            state[h] = state[h] @ change + torch.outer(v[t, at], k[t, at])
            o.append(state[h] @ r[t, at])
            extra.append((r[t, at] * part.bonus[h] * k[t, at]).sum() * v[t, at])
        rows.append(g[t] * (head_norm(torch.stack(o), part) + torch.cat(extra)))
    return part.o_proj(torch.stack(rows))


NAIVE = {"rwkv4": rwkv4, "rwkv5": rwkv5, "rwkv6": rwkv6, "rwkv7": rwkv7}


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_is_the_papers_formula(name: str) -> None:
    mixer, args = MIXERS[name]
    part, x, first = built("mixers", mixer, args), draw(1, T, D), draw(1, T, 15, seed=2)
    ctx = Context(phase="train", positions=torch.arange(T)[None], values={"first_value": first})
    same(part(x, ctx, None), NAIVE[mixer](part, x[0], first[0])[None], 1e-10)


@pytest.mark.parametrize("version", CHANNELS)
def test_the_channel_is_the_papers_formula(version: str) -> None:
    part, x = built("channels", "rwkv_channel_mix", CHANNELS[version]), draw(T, D)
    own, before = (x, shifted(x)) if part.args.weighs == "own" else (shifted(x), x)
    k = part.up_proj(part.mix_k * own + (1 - part.mix_k) * before)
    expected = part.down_proj(torch.clamp(k, min=0) ** 2)
    if part.args.gate:
        expected = torch.sigmoid(part.gate_proj(part.mix_r * own + (1 - part.mix_r) * before)) * expected
    same(part(x[None], Context(phase="train", positions=torch.arange(T)[None])), expected[None], 1e-12)


def test_the_first_layer_hands_its_value_on() -> None:
    part, x = built("mixers", "rwkv7", {**HEADS, **RANKS, "first_value": "write"}), draw(1, T, D)
    _, written = part(x, Context(phase="train", positions=torch.arange(T)[None]))
    mixed = x[0] + (shifted(x[0]) - x[0]) * part.mix[3]
    same(written["first_value"], part.v_proj(mixed)[None], 1e-12)


def test_decays_and_mixes_start_by_depth() -> None:
    first, last = (built("mixers", "rwkv5", {**HEADS, "layer_index": index, "depth": 4}) for index in (0, 3))
    for part in (first, last):
        part.init_weights(0.02)
    ramp = torch.arange(D).double() / D
    torch.testing.assert_close(first.mix_k.double(), ramp, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last.mix_k.double(), ramp**0.25, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last.time_decay.flatten()[[0, -1]].double(), torch.tensor([-6.0, -1.0]).double())


@pytest.mark.parametrize("name", ["rwkv7", "channels/rwkv_channel_mix", "slstm/bare"])
def test_padding_between_tokens_is_skipped(name: str) -> None:
    model, rows = make([name, name]), ids(2, 10)
    batch, mask = rows.clone(), torch.ones_like(rows)
    batch[0, 3:6], mask[0, 3:6] = 7, 0
    batch[1, 7:9], mask[1, 7:9] = 7, 0  # at the end of a chunk
    found, _ = feed(model, batch, (5, 4, 1), attention_mask=mask)
    first, _ = feed(model, torch.cat([rows[:1, :3], rows[:1, 6:]], 1), (7,))
    second, _ = feed(model, torch.cat([rows[1:, :7], rows[1:, 9:]], 1), (8,))
    same(found[:1, 6:], first[:, 3:])
    same(found[1:, 9:], second[:, 7:])
