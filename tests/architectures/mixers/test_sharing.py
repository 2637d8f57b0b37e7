"""Cross-layer sharing against the formulas: keys and values, memories, differential attention, gated retention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zoo_models import ROPES, draw, feed, forward, make, same, stir, swiglu_layer

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.differential import lambda_start
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.rope import RotaryTable
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.errors import ZooError

T = 17
FULL = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"}
CONFIG = DecoderConfig(vocab_size=97, hidden_size=64, layers=(), ropes=ROPES)


def context() -> Context:
    positions = torch.arange(T)[None]
    ropes = {name: RotaryTable(rope, 2048)(positions) for name, rope in ROPES.items()}
    return Context(phase="train", positions=positions, ropes=ropes)


def build(name: str, **args: Any) -> Any:
    cls = registry.get("mixers", name, "MODULE")
    torch.manual_seed(0)
    module = cls(CONFIG, cls.parse(args)).double()
    stir(module, std=0.2)
    return module


def draw_x(seed: int) -> Tensor:
    return torch.randn(2, T, 64, generator=torch.Generator().manual_seed(seed)).double()


def softmax(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal attention of `q [B, T, H, K]` to `k, v [B, T, G, K]`, written out."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    apart = torch.arange(T)[:, None] - torch.arange(T)
    seen = (apart >= 0) & (apart < (window or T))
    return torch.einsum("bhij,bjhv->bihv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 5])
def test_cross_attends_to_the_writers_keys_and_values(window: int | None) -> None:
    writer, reader = (
        build("attention", **FULL, window=window, writes="kv"),
        build("cross", **FULL, window=window, kv="kv"),
    )
    ctx, first, second = context(), draw_x(1), draw_x(2)
    with torch.no_grad():
        _, values = writer(first, ctx)
        q, _ = reader.queries(second, ctx)
        expected = reader.o_proj(softmax(q, *writer.keys_values(first, ctx), window).flatten(-2))
        same(reader(second, replace(ctx, values=values)), expected, 1e-12)
    assert {name for name, _ in reader.named_parameters()} == {"q_proj.weight", "o_proj.weight"}


@pytest.mark.parametrize("window", [None, 5])
def test_differential_attention_is_the_difference_of_two_softmaxes(window: int | None) -> None:
    start = lambda_start(3)
    module, ctx, x = build("attention", **FULL, window=window, differential=start), context(), draw_x(1)
    with torch.no_grad():
        q, (k, v) = module.queries(x, ctx)[0], module.keys_values(x, ctx)
        d = module.difference
        factor = (d.lambda_q1 @ d.lambda_k1).exp() - (d.lambda_q2 @ d.lambda_k2).exp() + start
        heads = []
        for pair in range(2):  # two pairs of query heads read the one pair of KV heads
            both = [
                softmax(q[:, :, [2 * pair + i]], k[:, :, [i]], torch.cat([v[:, :, [0]], v[:, :, [1]]], -1), window)
                for i in (0, 1)
            ]
            o = both[0] - factor * both[1]
            heads.append(o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * d.norm.weight * (1 - start))
        same(module(x, ctx), module.o_proj(torch.cat(heads, 2).flatten(-2)), 1e-12)
    assert lambda_start(0) == pytest.approx(0.2)


def test_a_gated_memory_unit_gates_what_mamba_read() -> None:
    mamba, gmu = build("mamba", inner=96, state_dim=8, writes="memory"), build("gmu", inner=96)
    ctx, x, later = context(), draw_x(1), draw_x(2)
    with torch.no_grad():
        out, values = mamba(x, ctx)
        gate = mamba.in_proj(x)[..., 96:]
        same(
            mamba.out_proj(values["memory"] * F.silu(gate)), out, 1e-12
        )  # the memory is what precedes mamba's own gate
        expected = gmu.out_proj(F.silu(gmu.in_proj(later)) * values["memory"])
        same(gmu(later, replace(ctx, values=values)), expected, 1e-12)


def test_gated_retention_is_its_recurrence() -> None:
    module, ctx, x = build("gated_retention", heads=2, head_dim=16, value_dim=24, rope="default"), context(), draw_x(1)
    with torch.no_grad():
        q, k, v = module.expanded_qkv(x, ctx)
        decay = torch.exp(F.logsigmoid(x @ module.decay_proj.weight.T) / 16)
        state, rows = torch.zeros(2, 2, 16, 24).double(), []
        for t in range(T):
            state = decay[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
            rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * 16**-0.5, state))
        o = torch.stack(rows, 1)
        o = (o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2)
        same(module(x, ctx), module.o_proj(F.silu(module.g_proj(x)) * o), 1e-12)


def model_of(*layers: Layer) -> Any:
    decoder = DecoderConfig(vocab_size=97, hidden_size=64, layers=layers, ropes=ROPES)
    return make(ZooConfig.from_decoder(decoder, "test"))


def test_a_name_means_its_last_writer() -> None:
    local, full = {**FULL, "window": 4}, FULL
    layers = (
        swiglu_layer("attention", {**local, "writes": "a"}),
        swiglu_layer("attention", {**full, "writes": "b"}),
        swiglu_layer("cross", {**local, "kv": "a"}),
        swiglu_layer("cross", {**full, "kv": "b"}),
        swiglu_layer("attention", {**local, "writes": "a"}),
        swiglu_layer("cross", {**local, "kv": "a"}),
    )
    model, ids = model_of(*layers), draw(2, 14)
    same(feed(model, ids, (6, 1, 1, 6))[0], forward(model, ids))


BAD = [
    (dict(kv_heads=4), "kv_heads was 4"),
    (dict(window=4), "window was 4"),
    (dict(head_dim=8, rope=None), "head_dim was 8"),
    (dict(k_bias=True), "makes no keys"),
    (dict(kv="other"), "no earlier layer writes"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[message for _, message in BAD])
def test_a_reader_that_does_not_fit_its_writer_is_refused(args: dict[str, Any], message: str) -> None:
    writer = swiglu_layer("attention", {**FULL, "writes": "kv"})
    with pytest.raises(ZooError, match=message):
        DecoderConfig(
            vocab_size=97,
            hidden_size=64,
            layers=(writer, swiglu_layer("cross", {**FULL, "kv": "kv", **args})),
            ropes=ROPES,
        )


@pytest.mark.parametrize(
    ("args", "message"), [(dict(kv_heads=1), "pairs of heads"), (dict(sink_logits=True), "choose one")]
)
def test_differential_attention_needs_pairs(args: dict[str, Any], message: str) -> None:
    cls = registry.get("mixers", "attention", "MODULE")
    with pytest.raises(ZooError, match=message):
        cls.parse({**FULL, "differential": 0.2, **args}).check(CONFIG)
