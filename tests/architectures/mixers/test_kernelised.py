"""Linear attention with kernels and fixed decays, against the papers' formulas written token by token.

B batch, T tokens, H heads, K key and V value head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Rope
from zoo.architectures.core.mixer import Context, Mixer
from zoo.architectures.core.rope import RotaryTable, apply_rope
from zoo.errors import ZooError

B, T, D, H = 2, 21, 32, 3
CONFIG = DecoderConfig(vocab_size=9, hidden_size=D, layers=(), ropes={"turned": Rope(dim=8, pairing="interleaved")})
SIZES: dict[str, Any] = dict(heads=H, head_dim=8, value_dim=10)


def made(name: str, args: dict[str, Any]) -> Mixer:
    """The mixer in fp64 with random weights and buffers."""
    cls = registry.get("mixers", name, "MODULE")
    parsed = cls.parse(args)
    parsed.check(CONFIG)
    mixer = cls(CONFIG, parsed).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in mixer.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.4 if tensor.dim() == 2 else 1.0))
    return mixer


def context() -> Context:
    positions = torch.arange(T).expand(B, T)
    return Context(
        phase="train", positions=positions, ropes={"turned": RotaryTable(CONFIG.ropes["turned"], T)(positions)}
    )


def inputs() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def heads(x: Tensor, linear: torch.nn.Module) -> Tensor:
    return linear(x).unflatten(-1, (H, -1))


def qkv(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads(x, mixer.q_proj), heads(x, mixer.k_proj), heads(x, mixer.v_proj)


def weighted(weight: Callable[[int, int], Tensor], v: Tensor) -> Tensor:
    """`sum_{s <= t} weight(t, s) v_s` over the weights' sum (0 where all are 0); `weight(t, s)` is `[B, H]`."""
    rows = []
    for t in range(T):
        weights = torch.stack([weight(t, s) for s in range(t + 1)], 1)
        mean = torch.einsum("bsh,bshv->bhv", weights, v[:, : t + 1]) / weights.sum(1)[..., None]
        rows.append(mean.nan_to_num())
    return torch.stack(rows, 1)


def decayed(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
    """`o_t = q_t S_t` with `S_t = rate S_{t-1} + k_t^T v_t`; `rates [H]`."""
    state, rows = torch.zeros(B, H, q.shape[-1], v.shape[-1], dtype=torch.float64), []
    for t in range(T):
        state = rates.view(H, 1, 1) * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(rows, 1)


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def near(found: Tensor, expected: Tensor, bound: float = 1e-9) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert torch.isfinite(found).all() and error <= bound, f"{error:.1e}"


def test_linear_transformer() -> None:
    mixer, x = made("linear_transformer", {**SIZES, "q_bias": True}), inputs()
    q, k, v = qkv(mixer, x)
    q, k = (torch.where(y > 0, y + 1, y.exp()) for y in (q, k))
    expected = weighted(lambda t, s: (q[:, t] * k[:, s]).sum(-1), v)
    near(mixer(x, context()), mixer.o_proj(expected.flatten(-2)))


def test_cosformer() -> None:
    mixer, x = made("cosformer", {**SIZES, "max_distance": 30}), inputs()
    q, k, v = qkv(mixer, x)

    def weight(t: int, s: int) -> Tensor:
        return (F.relu(q[:, t]) * F.relu(k[:, s])).sum(-1) * math.cos(math.pi / 2 * (t - s) / 30)

    near(mixer(x, context()), mixer.o_proj(weighted(weight, v).flatten(-2)))


@pytest.mark.parametrize("gated", [False, True])
def test_rfa(gated: bool) -> None:
    mixer, x = made("rfa", {**SIZES, "features": 256, "gated": gated}), inputs()
    with torch.no_grad():
        mixer.sigma.copy_(mixer.sigma.abs() * 0.5)
    q, k, v = qkv(mixer, x)
    q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    w = mixer.sigma[:, None] * mixer.directions
    phi = [torch.einsum("bthk,hmk->bthm", y, w) for y in (q, k)]
    q, k = (torch.cat([y.sin(), y.cos()], -1) for y in phi)
    gate = torch.sigmoid(mixer.decay_proj(x)) if gated else None

    def weight(t: int, s: int) -> Tensor:
        overlap = (q[:, t] * k[:, s]).sum(-1)
        return overlap if gate is None else overlap * (1 - gate[:, s]) * gate[:, s + 1 : t + 1].prod(1)

    near(mixer(x, context()), mixer.o_proj(weighted(weight, v).flatten(-2)), 1e-7)


def test_rfa_estimates_the_gaussian_kernel() -> None:
    cls = registry.get("mixers", "rfa", "MODULE")
    mixer = cls(CONFIG, cls.parse({**SIZES, "features": 20000}))
    mixer.init_weights(0.02)
    x, y = torch.randn(2, 1, 1, H, 8, generator=torch.Generator().manual_seed(4))
    found = (mixer._waves(x) * mixer._waves(y)).sum(-1) / 20000
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    torch.testing.assert_close(found, torch.exp(-(x - y).square().sum(-1) / 2), rtol=0.05, atol=0)


def test_performer_is_attention_over_its_features() -> None:
    mixer, x = made("performer", {**SIZES, "features": 24}), inputs()
    q, k, v = (y / 8**0.25 if i < 2 else y for i, y in enumerate(qkv(mixer, x)))
    log_q, log_k = (y @ mixer.directions.T - y.square().sum(-1, keepdim=True) / 2 for y in (q, k))
    q = (log_q - log_q.amax(-1, keepdim=True)).exp() + 1e-4
    expected = weighted(lambda t, s: (q[:, t] * log_k[:, s].exp()).sum(-1), v)
    near(mixer(x, context()), mixer.o_proj(expected.flatten(-2)))


def test_performer_estimates_softmax() -> None:
    cls = registry.get("mixers", "performer", "MODULE")
    mixer = cls(CONFIG, cls.parse({**SIZES, "features": 16384}))
    mixer.init_weights(0.02)
    x, y = 0.5 * torch.randn(2, 1, 1, H, 8, generator=torch.Generator().manual_seed(4))
    found = (mixer._exponents(x) + mixer._exponents(y)).exp().mean(-1)
    torch.testing.assert_close(found, ((x * y).sum(-1) / 8**0.5).exp(), rtol=0.05, atol=0)
    blocks = mixer.directions.double().unflatten(0, (-1, 8))
    products = blocks @ blocks.mT
    assert (products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))).abs().max() < 1e-5
    assert 7.5 < products.diagonal(dim1=1, dim2=2).mean() < 8.5  # the squared length of a Gaussian vector


def test_performer_keeps_large_keys_in_range_without_looking_ahead() -> None:
    mixer, x = made("performer", {**SIZES, "features": 24}).float(), inputs().float()
    with torch.no_grad():
        mixer.k_proj.weight.mul_(8)  # exponents down to about -1000
        whole, start = mixer(x, context()), x.clone()
        start[:, 11:] = 5.0
        assert torch.isfinite(whole).all()
        torch.testing.assert_close(mixer(start, context())[:, :11], whole[:, :11])
        double = mixer.double()(inputs(), context())
    near(whole.double(), double, 1e-3)


@pytest.mark.parametrize("name", ["performer", "rfa"])
def test_random_directions_are_seeded_and_redrawn(name: str) -> None:
    cls = registry.get("mixers", name, "MODULE")
    draws = []
    for seed in (3, 3, 4):
        mixer = cls(CONFIG, cls.parse({**SIZES, "features": 24, "seed": seed}))
        mixer.init_weights(0.02)
        draws.append(mixer.state_dict()["directions"].clone())
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    mixer.redraw(3)
    assert torch.equal(mixer.directions, draws[0])


@pytest.mark.parametrize("center", [False, True])
def test_retention(center: bool) -> None:
    args = {**SIZES, "rope": "turned", "norm_center": center, "norm_eps": 1e-3}
    mixer, x, ctx = made("retention", args), inputs(), context()
    q, k, v = qkv(mixer, x)
    q, k = (apply_rope(y, ctx.ropes["turned"], "interleaved") for y in (q, k))
    rates = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(H)], dtype=torch.float64)
    o = decayed(q, k / 8**0.5, v, rates)
    o = rms(o - o.mean(-1, keepdim=True) if center else o, 1e-3) * mixer.o_norm
    near(mixer(x, ctx), mixer.o_proj(o.flatten(-2) * F.silu(mixer.g_proj(x))))


def test_lightning_of_minimax() -> None:
    config = MiniMaxConfig(
        hidden_size=D, num_attention_heads=H, head_dim=8, num_hidden_layers=5, block_size=4, layer_types=None
    )
    theirs = MiniMaxLightningAttention(config, layer_idx=2).double()
    mixer, x = made("lightning", dict(heads=H, head_dim=8, layer_index=2, depth=5)), inputs()
    with torch.no_grad():
        fused = [heads(torch.eye(D).double(), p).permute(1, 2, 0) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
        theirs.qkv_proj.weight.copy_(torch.cat(fused, 1).flatten(0, 1))
        theirs.output_gate.weight.copy_(mixer.g_proj.weight)
        theirs.norm.weight.copy_(mixer.o_norm)
        theirs.out_proj.weight.copy_(mixer.o_proj.weight)
        expected = theirs(x, None, None)[0]
    near(mixer(x, context()), expected, 1e-6)  # their slopes and norm are fp32


def test_lightning_of_transnormerllm() -> None:
    args = dict(slopes="transnormerllm", layer_index=2, depth=5, value_activation=None, gate="linear", lrpe=True)
    mixer, x = made("lightning", {**SIZES, **args, "norm_weight": False}), inputs()
    q, k, v = qkv(mixer, x)
    state, rows = torch.zeros(B, H, 16, 10, dtype=torch.float64), []
    for t in range(T):
        turned = (t * mixer.theta).double()
        wave = torch.cat([turned.cos(), turned.sin()], -1)
        at_q, at_k = (torch.cat([F.silu(y[:, t])] * 2, -1) * wave for y in (q, k))
        rates = torch.tensor([math.exp(-8 * h / H * (1 - 2 / 5)) for h in range(H)], dtype=torch.float64)
        state = rates.view(H, 1, 1) * state + torch.einsum("bhk,bhv->bhkv", at_k, v[:, t])
        rows.append(torch.einsum("bhk,bhkv->bhv", at_q, state))
    o = rms(torch.stack(rows, 1).flatten(-2), 1e-6)
    near(mixer(x, context()), mixer.o_proj(o * mixer.g_proj(x)))


def test_published_decays() -> None:
    """Those at layer 0 of 64 heads, and that deeper layers forget less."""
    cls = registry.get("mixers", "lightning", "MODULE")
    config = DecoderConfig(vocab_size=9, hidden_size=64, layers=())
    ends = {"minimax": (0.400, 0.996), "transnormerllm": (1.0, 0.0004)}
    for rule, (first, last) in ends.items():
        layers = [cls.parse(dict(heads=64, head_dim=1, slopes=rule, layer_index=n, depth=4)) for n in (0, 3)]
        rates = [cls(config, args).log_decay(torch.zeros(1)).exp() for args in layers]
        torch.testing.assert_close(rates[0][[0, -1]], torch.tensor([first, last]), rtol=0.05, atol=1e-3)
        assert (rates[1] >= rates[0]).all() and rates[1].mean() > rates[0].mean()


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("lightning", dict(slopes="alibi"), "slopes 'alibi'"),
        ("lightning", dict(layer_index=4, depth=4), "layer_index was 4"),
        ("lightning", dict(activation="gelu"), "activation 'gelu'"),
        ("lightning", dict(norm_per_head=True), "choose one"),
        ("retention", dict(gate="gelu"), "gate 'gelu'"),
        ("performer", dict(features=0), "features was 0"),
        ("rfa", dict(features=0), "features was 0"),
        ("cosformer", dict(max_distance=0), "max_distance was 0"),
    ],
)
def test_bad_arguments_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        registry.get("mixers", name, "MODULE").parse({**SIZES, **args}).check(CONFIG)
