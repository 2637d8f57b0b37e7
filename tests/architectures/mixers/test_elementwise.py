"""Elementwise recurrences, state spaces, averages and convolutions, against their formulas token by token in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from naive import convolved, inputs, linear, make_mixer, rms
from torch import Tensor
from zoo_models import WIDTH, draw, feed, forward, make, same

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.errors import ZooError


@pytest.mark.parametrize("head_dim", [1, 4])
def test_h3_is_two_state_spaces_with_products_between(head_dim: int) -> None:
    m = make_mixer("h3", head_dim=head_dim, shift=5, state_dim=6)
    x, ctx = inputs()
    H, q, k, v = WIDTH // head_dim, *(linear(x, p) for p in (m.q_proj, m.k_proj, m.v_proj))
    k = convolved(k, m.convs.k) + m.shift_skip * k
    dt = m.log_dt.exp()[:, None]
    z = dt * torch.complex(-m.A_log.exp(), m.omega)
    A, B, C = (1 + z / 2) / (1 - z / 2), dt / (1 - z / 2), torch.view_as_complex(m.C)
    s, outputs = torch.zeros(2, H, head_dim, head_dim, 3, dtype=torch.complex128), []
    for t in range(x.shape[1]):
        left, right, query = (y[:, t].view(2, H, head_dim) for y in (k, v, q))
        u = left[..., :, None] * right[..., None, :]
        s = A[:, None, None] * s + B[:, None, None] * u[..., None]
        y = 2 * (C[:, None, None] * s).sum(-1).real + m.D[:, None, None] * u
        outputs.append(torch.einsum("bhi,bhij->bhj", query, y).flatten(1))
    same(m(x, ctx), linear(torch.stack(outputs, 1), m.o_proj), 1e-10)


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), (48, 1)])
def test_gateloop_decays_and_turns_as_the_data_say(heads: int, head_dim: int) -> None:
    m = make_mixer("gateloop", heads=heads, head_dim=head_dim)
    x, ctx = inputs()
    q, k, v, g = (linear(x, p).unflatten(-1, (heads, -1)) for p in (m.q_proj, m.k_proj, m.v_proj, m.g_proj))
    size, phase = (part.unflatten(-1, (heads, -1)) for part in linear(x, m.a_proj).chunk(2, -1))
    a = torch.polar(torch.sigmoid(size), phase)
    S, outputs = torch.zeros(2, heads, head_dim, head_dim, dtype=torch.complex128), []
    for t in range(x.shape[1]):
        S = a[:, t, ..., None] * S + k[:, t, ..., None] * v[:, t, :, None]
        outputs.append((q[:, t, ..., None] * S).sum(-2).real)
    y = torch.stack(outputs, 1) * F.silu(g)
    same(m(x, ctx), linear(y.flatten(-2), m.o_proj), 1e-10)


def bound(m: Any, layer_index: int) -> Tensor | float:
    shares = m.forget.bounds.gamma.exp() / m.forget.bounds.gamma.exp().sum(0) if layer_index else None
    return 0.0 if shares is None else shares.cumsum(0)[layer_index] - shares[0]


@pytest.mark.parametrize("layer_index", [0, 2])
@pytest.mark.parametrize("complex_state", [False, True])
def test_hgrn_keeps_at_least_its_lower_bound(layer_index: int, complex_state: bool) -> None:
    m = make_mixer("hgrn", width=24, layer_index=layer_index, depth=4, complex=complex_state)
    x, ctx = inputs()
    b = bound(m, layer_index)
    f = b + (1 - b) * torch.sigmoid(linear(x, m.f_proj))
    u = F.silu(linear(x, m.i_proj))
    if complex_state:
        u, turn = torch.complex(*u.chunk(2, -1)), torch.polar(torch.ones_like(m.theta), m.theta)
    else:
        turn = torch.ones(())
    h, outputs = torch.zeros_like(u[:, 0]), []
    for t in range(x.shape[1]):
        h = f[:, t] * turn * h + (1 - f[:, t]) * u[:, t]
        outputs.append(torch.cat([h.real, h.imag], -1) if complex_state else h)
    y = rms(torch.stack(outputs, 1), m.o_norm) * F.silu(linear(x, m.g_proj))
    same(m(x, ctx), linear(y, m.o_proj), 1e-10)


@pytest.mark.parametrize("layer_index", [0, 1])
def test_hgrn2_writes_with_what_it_forgets(layer_index: int) -> None:
    m = make_mixer("hgrn2", heads=2, head_dim=16, value_dim=24, layer_index=layer_index, depth=3)
    x, ctx = inputs()
    b = bound(m, layer_index)
    f = (b + (1 - b) * torch.sigmoid(linear(x, m.f_proj))).unflatten(-1, (2, -1))
    q, v = F.silu(linear(x, m.q_proj)).unflatten(-1, (2, -1)) / 4, linear(x, m.i_proj).unflatten(-1, (2, -1))
    S, outputs = torch.zeros(2, 2, 16, 24, dtype=x.dtype), []
    for t in range(x.shape[1]):
        S = f[:, t, ..., None] * S + (1 - f[:, t, ..., None]) * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S).flatten(1))
    same(m(x, ctx), linear(rms(torch.stack(outputs, 1), m.o_norm), m.o_proj), 1e-10)


def test_aft_averages_the_values_so_far() -> None:
    m = make_mixer("aft", attention_size=48)
    x, ctx = inputs()
    q, k, v = (linear(x, p) for p in (m.q_proj, m.k_proj, m.v_proj))
    outputs = []
    for t in range(x.shape[1]):
        weights = k[:, : t + 1].exp()
        outputs.append(torch.sigmoid(q[:, t]) * (weights * v[:, : t + 1]).sum(1) / weights.sum(1))
    same(m(x, ctx), linear(torch.stack(outputs, 1), m.o_proj), 1e-10)


@pytest.mark.parametrize(("kernel", "gate"), [(4, None), (32, "silu")])
def test_long_conv_is_a_sum_over_its_kernel(kernel: int, gate: str | None) -> None:
    m = make_mixer("long_conv", kernel=kernel, width=48, gate=gate)
    x, ctx = inputs()
    y = convolved(linear(x, m.v_proj), m.kernel.flip(0).T)
    if gate is not None:
        y = y * F.silu(linear(x, m.g_proj))
    same(m(x, ctx), linear(y, m.o_proj), 1e-10)


@pytest.mark.parametrize("name", ["hgrn", "hgrn2"])
def test_lower_bounds_rise_with_depth_and_are_one_for_all_layers(name: str, tmp_path: Path) -> None:
    sizes = dict(vocab_size=97, hidden_size=32, depth=4, intermediate_size=48)
    model = make(ZooConfig.from_decoder(registry.get("architectures", name, "layout")(**sizes), name))
    forgets = [layer.mixer.forget for layer in model.model.layers]
    assert not hasattr(forgets[0], "bounds")
    assert all(forget.bounds is forgets[1].bounds for forget in forgets[1:])
    levels = [forget.bounds(forget.layer_index) for forget in forgets[1:]]
    assert all((high > low).all() for low, high in zip(levels, levels[1:], strict=False))
    assert all(((level > 0) & (level < 1)).all() for level in levels)
    slowest = forgets[3](torch.full((1, 1, levels[-1].shape[0]), -50.0))
    same(slowest[0, 0].exp(), levels[-1], 1e-6)
    model.save_pretrained(tmp_path)
    ids = draw(2, 9)
    loaded = ZooForCausalLM.from_pretrained(tmp_path)
    same(forward(loaded, ids), forward(model, ids))
    same(feed(loaded, ids, (4, 1, 1, 3))[0], forward(model, ids))


def test_fresh_lower_bounds_are_steps_of_one_over_depth() -> None:
    model = ZooForCausalLM(
        ZooConfig.from_decoder(
            registry.get("architectures", "hgrn", "layout")(
                vocab_size=97, hidden_size=32, depth=4, intermediate_size=48
            ),
            "hgrn",
        )
    )
    levels = [layer.mixer.forget.bounds(layer.mixer.forget.layer_index) for layer in model.model.layers[1:]]
    assert torch.stack(levels)[:, 0].tolist() == pytest.approx([0.25, 0.5, 0.75])


def test_the_published_h3_has_attention_where_it_says() -> None:
    module = registry.load("architectures", "h3")
    decoder = module.layout(**module.PRESETS["355m"])
    assert [index for index, layer in enumerate(decoder.layers) if layer.mixer == "attention"] == [8, 16]
    assert {layer.mixer for layer in decoder.layers} == {"h3", "attention"} and not decoder.ropes
    assert decoder.layers[8].mixer_args["heads"] == 16 and decoder.layers[0].mixer_args == {
        "head_dim": 1,
        "shift": 64,
        "state_dim": 64,
    }


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("h3", {"head_dim": 3}, "head_dim was 3; it must divide the hidden size"),
        ("h3", {"state_dim": 5}, "state_dim was 5; it must be even"),
        ("hgrn", {"layer_index": 3, "depth": 3}, "layer_index was 3; it must be from 0 to 2"),
        ("aft", {"attention_size": 0}, "attention_size was 0"),
        ("long_conv", {"kernel": 1}, "kernel was 1; it must be at least 2"),
    ],
)
def test_arguments_that_cannot_be_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    cls = registry.get("mixers", name, "MODULE")
    with pytest.raises(ZooError, match=message):
        cls.parse(args).check(DecoderConfig(vocab_size=8, hidden_size=WIDTH, layers=()))
