"""Mixers that learn as they read, against their formulas written out token by token in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from naive import convolved, inputs, linear, make_mixer, rms, standardised, unit
from torch import Tensor
from zoo_models import WIDTH, same

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.mixers.fast_weights import dpfp
from zoo.errors import ZooError


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1))


@pytest.mark.parametrize("beta_scale", [1.0, 2.0])
def test_delta_net_overwrites_what_a_key_held(beta_scale: float) -> None:
    m = make_mixer("delta_net", heads=2, head_dim=16, value_dim=24, beta_scale=beta_scale)
    x, ctx = inputs()
    q, k, v = (
        heads(F.silu(convolved(linear(x, p), w)), 2)
        for p, w in ((m.q_proj, m.convs.q), (m.k_proj, m.convs.k), (m.v_proj, m.convs.v))
    )
    q, k, beta = unit(q) / 4, unit(k), beta_scale * torch.sigmoid(linear(x, m.b_proj))
    S, outputs = torch.zeros(2, 2, 16, 24, dtype=x.dtype), []
    for t in range(x.shape[1]):
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    y = rms(torch.stack(outputs, 1), m.o_norm).flatten(-2)
    same(m(x, ctx), linear(y, m.o_proj), 1e-10)


def test_dpfp_is_products_of_neighbours() -> None:
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    r = [1.0, 0.0, 3.0, 0.0, 2.0, 0.0]
    expected = [[r[j] * r[(j - i) % 6] for j in range(6)] for i in (1, 2, 3)]
    assert dpfp(x, 3).tolist() == [value for row in expected for value in row]
    assert dpfp(x, 3).sum() > 0


@pytest.mark.parametrize("rule", ["delta", "sum"])
def test_fast_weights_are_written_by_their_rule(rule: str) -> None:
    m = make_mixer("fast_weights", heads=2, head_dim=8, value_dim=24, nu=2, rule=rule)
    x, ctx = inputs()
    q, k, v = (heads(linear(x, p), 2) for p in (m.q_proj, m.k_proj, m.v_proj))
    q, k = dpfp(q, 2), dpfp(k, 2)
    S, z, outputs = torch.zeros(2, 2, 32, 24, dtype=x.dtype), torch.zeros(2, 2, 32, dtype=x.dtype), []
    for t in range(x.shape[1]):
        if rule == "delta":
            beta = torch.sigmoid(linear(x[:, t], m.b_proj))[..., None]
            key, query = (f[:, t] / f[:, t].sum(-1, keepdim=True) for f in (k, q))
            S = S + key[..., None] * (beta * (v[:, t] - torch.einsum("bhk,bhkv->bhv", key, S)))[..., None, :]
            outputs.append(torch.einsum("bhk,bhkv->bhv", query, S))
        else:
            S, z = S + k[:, t, ..., None] * v[:, t, :, None], z + k[:, t]
            read = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
            outputs.append(read / (q[:, t] * z).sum(-1, keepdim=True).clamp(min=1e-6))
    same(m(x, ctx), linear(torch.stack(outputs, 1).flatten(-2), m.o_proj), 1e-10)


def test_longhorn_forgets_what_its_keys_say() -> None:
    m = make_mixer("longhorn", inner=48, state_dim=5, beta_rank=3)
    x, ctx = inputs()
    u, z = linear(x, m.in_proj).chunk(2, -1)
    u = F.silu(convolved(u, m.convs.x, m.convs.x_bias))
    r, k, q = linear(u, m.x_proj).split((3, 5, 5), -1)
    beta = torch.sigmoid(linear(r, m.beta_proj) + m.beta_bias)
    S, outputs = torch.zeros(2, 48, 5, dtype=x.dtype), []
    for t in range(x.shape[1]):
        step = beta[:, t] / (1 + beta[:, t] * k[:, t].square().sum(-1, keepdim=True))
        key, step = k[:, t, None], step[..., None]
        S = (1 - step * key**2) * S + step * u[:, t, :, None] * key
        outputs.append((S * q[:, t, None]).sum(-1) + m.D * u[:, t])
    same(m(x, ctx), linear(torch.stack(outputs, 1) * F.silu(z), m.out_proj), 1e-10)


def network(W: dict[str, Tensor], x: Tensor) -> Tensor:
    """`x [H, K]` through each head's inner model."""
    z = torch.einsum("hk,hkf->hf", x, W["W1"]) + W["b1"]
    if "W2" in W:
        z = torch.einsum("hf,hfv->hv", F.gelu(z, approximate="tanh"), W["W2"]) + W["b2"]
    return z


def slopes(W: dict[str, Tensor], loss: Any) -> dict[str, Tensor]:
    leaves = {name: w.detach().requires_grad_() for name, w in W.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))


def scaled(factor: Tensor, w: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (w.dim() - 1)) * w


def turned(x: Tensor, place: int) -> Tensor:
    """Interleaved RoPE of `x [..., K]` by the place in the mini-batch."""
    K = x.shape[-1]
    out = torch.empty_like(x)
    for i in range(K // 2):
        angle = torch.tensor(place * 10000.0 ** (-2 * i / K), dtype=x.dtype)
        a, b = x[..., 2 * i], x[..., 2 * i + 1]
        out[..., 2 * i], out[..., 2 * i + 1] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return out


@pytest.mark.parametrize("backbone", [{}, {"gate": True, "shared_qk": True}])
@pytest.mark.parametrize(("name", "names"), [("ttt_linear", ("W1", "b1")), ("ttt_mlp", ("W1", "b1", "W2", "b2"))])
def test_ttt_is_gradient_descent_on_the_tokens_it_reads(name: str, names: tuple[str, ...], backbone: Any) -> None:
    C, base_lr = 4, 0.7
    m = make_mixer(name, heads=2, head_dim=12, mini_batch=C, base_lr=base_lr, **backbone)
    x, ctx = inputs()
    q, v = linear(x, m.q_proj), heads(linear(x, m.v_proj), 2)
    if backbone:
        q, k = (convolved(q, getattr(m.convs, n), getattr(m.convs, f"{n}_bias")) for n in "qk")
    else:
        k = linear(x, m.k_proj)
    q, k, lr = heads(q, 2), heads(k, 2), base_lr / 12 * torch.sigmoid(linear(x, m.lr_proj))

    def f(W: dict[str, Tensor], token: Tensor) -> Tensor:
        return token + standardised(network(W, token), m.norm_weight, m.norm_bias)

    out = torch.zeros(2, x.shape[1], 2, 12, dtype=x.dtype)
    for b in range(2):
        W = {n: getattr(m, n).detach() for n in names}
        total = {n: torch.zeros_like(w) for n, w in W.items()}
        for t in range(x.shape[1]):
            place = t % C
            query, key, value = turned(q[b, t], place), turned(k[b, t], place), v[b, t]
            g = slopes(W, lambda L, key=key, value=value: (f(L, key) - value).square().sum() / 2)
            total = {n: total[n] + scaled(lr[b, t], g[n]) for n in W}
            step = max(1 / (place + 1) + m.step_offset[place].item(), 0.0)
            now = {n: W[n] - step * total[n] for n in W}
            out[b, t] = f(now, query)
            if place == C - 1:
                W, total = now, {n: torch.zeros_like(w) for n, w in W.items()}
    y = standardised(out.flatten(-2), m.o_norm.weight, m.o_norm.bias)
    if backbone:
        y = F.gelu(linear(x, m.g_proj), approximate="tanh") * y
    same(m(x, ctx), linear(y, m.o_proj), 1e-9)


class Remembering:
    """Titans' memory of one sequence, token by token; its gradients are taken where the segment began."""

    def __init__(self, memory: Any) -> None:
        self.m, self.seen = memory, 0
        self.began = {n: w.detach() for n, w in memory.network().items()}
        self.now = self.began
        self.momentum = {n: torch.zeros_like(w) for n, w in self.began.items()}

    def learn(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        m, C = self.m, self.m.mini_batch
        theta, eta, alpha = torch.sigmoid(linear(x, m.gates.proj).view(3, -1) + m.gates.gate_bias)
        theta, key = theta * m.gates.base_lr, unit(k)
        g = slopes(self.began, lambda L: (network(L, key) - v).square().sum() / 2)
        self.momentum = {n: scaled(eta, s) - scaled(theta, g[n]) for n, s in self.momentum.items()}
        self.now = {n: scaled(1 - alpha, w) + self.momentum[n] for n, w in self.now.items()}
        self.seen += 1
        answer = network(self.now, unit(q)).flatten()
        if self.seen % C == 0:
            self.began = self.now
        return linear(answer, m.o_proj)

    def read(self, x: Tensor) -> Tensor:
        q = heads(F.silu(linear(x, self.m.q_proj)), self.m.heads)
        return linear(network(self.began, unit(q)).flatten(), self.m.o_proj)

    def tokens(self, x: Tensor) -> Tensor:
        """`x [T, D]` with the short convolutions."""
        p = ((self.m.q_proj, "q"), (self.m.k_proj, "k"), (self.m.v_proj, "v"))
        q, k, v = (
            heads(F.silu(convolved(linear(x, proj)[None], getattr(self.m.convs, n))[0]), self.m.heads) for proj, n in p
        )
        return torch.stack([self.learn(q[t], k[t], v[t], x[t]) for t in range(x.shape[0])])


def rotated(x: Tensor, place: int) -> Tensor:
    """RoPE of `x [H, 16]`, halves paired."""
    speeds = 10000.0 ** (-torch.arange(8, dtype=x.dtype) / 8)
    cos, sin = (place * speeds).cos(), (place * speeds).sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attended(a: Any, query: Tensor, place: int, seen: list[tuple[Tensor, int]]) -> Tensor:
    """One token's attention over `seen`, tokens `[D]` with their places, and the persistent tokens."""
    q = rotated(heads(linear(query, a.q_proj), 2), place)
    k = [rotated(heads(linear(x, a.k_proj), 2), p) for x, p in seen]
    v = [heads(linear(x, a.v_proj), 2) for x, _ in seen]
    for token in a.persistent() if hasattr(a, "persistent") else ():
        k.append(heads(linear(token, a.k_proj), 2))
        v.append(heads(linear(token, a.v_proj), 2))
    weights = torch.softmax(torch.stack([(q * key).sum(-1) / 4 for key in k]), 0)
    return linear((weights[..., None] * torch.stack(v)).sum(0).flatten(), a.o_proj)


def gated(m: Any, y: Tensor, remembered: Tensor) -> Tensor:
    return rms(y, m.o_norm.weight, 1e-6) * torch.sigmoid(rms(remembered, m.m_norm.weight, 1e-6))


@pytest.mark.parametrize("width", [None, 20])
@pytest.mark.parametrize("variant", ["memory", "gate", "layer"])
def test_titans_put_attention_and_memory_together(variant: str, width: int | None) -> None:
    C, window = 4, None if variant == "memory" else 3
    sizes = dict(heads=2, head_dim=16, rope="default", persistent=2, memory_width=width, mini_batch=C, window=window)
    m = make_mixer("titans", variant=variant, conv=0 if variant == "memory" else 4, **sizes)
    x, ctx = inputs(tokens=10)
    naive = in_segments if variant == "memory" else over_a_window
    same(m(x, ctx), torch.stack([naive(m, row) for row in x]), 1e-9)


def in_segments(m: Any, x: Tensor) -> Tensor:
    """MAC over `x [T, D]`: a segment is attended to first, then learned."""
    memory, outputs = Remembering(m.memory), []
    for start in range(0, x.shape[0], m.args.mini_batch):
        seen: list[tuple[Tensor, int]] = []
        attention = []
        for t in range(start, min(start + m.args.mini_batch, x.shape[0])):
            seen += [(memory.read(x[t]), t), (x[t], t)]
            attention.append(attended(m.attention, x[t], t, seen))
        for y in attention:
            q, k, v = (heads(F.silu(linear(y, p)), 2) for p in (m.memory.q_proj, m.memory.k_proj, m.memory.v_proj))
            outputs.append(gated(m, y, memory.learn(q, k, v, y)))
    return torch.stack(outputs)


def over_a_window(m: Any, x: Tensor) -> Tensor:
    """MAG and MAL over `x [T, D]`."""
    remembered, outputs = Remembering(m.memory).tokens(x), []
    source = remembered if m.args.variant == "layer" else x
    for t in range(x.shape[0]):
        near = [(source[s], s) for s in range(max(0, t - m.args.window + 1), t + 1)]
        y = attended(m.attention, source[t], t, near)
        outputs.append(y if m.args.variant == "layer" else gated(m, y, remembered[t]))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("delta_net", {"heads": 2, "head_dim": 8, "beta_scale": 3.0}, "beta_scale was 3.0"),
        ("fast_weights", {"heads": 2, "head_dim": 8, "nu": 16}, "nu was 16; it must be from 1 to 15"),
        ("fast_weights", {"heads": 2, "head_dim": 8, "rule": "hebb"}, "rule 'hebb' is unknown"),
        ("ttt_linear", {"heads": 2, "head_dim": 7}, "head_dim was 7; it must be even"),
        ("titans", {"heads": 2, "head_dim": 8, "variant": "context"}, "variant 'context' is unknown"),
        ("titans", {"heads": 2, "head_dim": 8, "variant": "memory", "window": 4}, "window was 4"),
    ],
)
def test_arguments_that_cannot_be_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    cls = registry.get("mixers", name, "MODULE")
    with pytest.raises(ZooError, match=message):
        cls.parse(args).check(DecoderConfig(vocab_size=8, hidden_size=WIDTH, layers=()))
