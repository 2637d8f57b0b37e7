"""Attention over slots, against the papers' formulas written token by token.

B batch, T tokens, H heads, M slots, K key and V value head dimension.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Rope
from zoo.architectures.core.mixer import Context, Mixer
from zoo.architectures.core.rope import RotaryTable, apply_rope
from zoo.errors import ZooError

B, T, D, H, M = 2, 19, 32, 3, 5
CONFIG = DecoderConfig(vocab_size=9, hidden_size=D, layers=(), ropes={"default": Rope(dim=8)})
SIZES: dict[str, Any] = dict(heads=H, head_dim=8, value_dim=10, slots=M)


def made(name: str, args: dict[str, Any]) -> Mixer:
    """The mixer in fp64 with random weights."""
    cls = registry.get("mixers", name, "MODULE")
    mixer = cls(CONFIG, cls.parse(args)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in mixer.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.5 if tensor.dim() == 2 else 1.0))
    return mixer


def context() -> Context:
    positions = torch.arange(T).expand(B, T)
    table = RotaryTable(CONFIG.ropes["default"], T)(positions)
    return Context(phase="train", positions=positions, ropes={"default": table})


def inputs() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def heads(x: Tensor, linear: torch.nn.Module) -> Tensor:
    return linear(x).unflatten(-1, (H, -1))


def read(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax of `q [B, H, K]` over slots `keys [B, H, M, K]`, of `values [B, H, M, V]`."""
    return torch.einsum("bhm,bhmv->bhv", torch.einsum("bhk,bhmk->bhm", q, keys).softmax(-1), values)


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def near(found: Tensor, expected: Tensor) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert torch.isfinite(found).all() and error <= 1e-9, f"{error:.1e}"


def test_gsa() -> None:
    mixer, x = made("gsa", SIZES), inputs()
    q, k, v = (F.silu(heads(x, p)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    keep = torch.sigmoid(heads(x, mixer.decay_proj)) ** (1 / 8)
    keys, values, rows = torch.zeros(B, H, M, 8).double(), torch.zeros(B, H, M, 10).double(), []
    for t in range(T):
        a = keep[:, t, ..., None]
        keys = a * keys + (1 - a) * k[:, t, :, None]
        values = a * values + (1 - a) * v[:, t, :, None]
        rows.append(read(q[:, t], keys, values))
    o = rms(F.silu(torch.stack(rows, 1)).flatten(-2), 1e-5) * mixer.o_norm
    near(mixer(x, context()), mixer.o_proj(o))


@pytest.mark.parametrize("gated", [False, True])
def test_abc(gated: bool) -> None:
    args = {**SIZES, "rope": "default", "gate": "silu", "norm": True} if gated else SIZES
    mixer, x, ctx = made("abc", args), inputs(), context()
    q, k, v = (heads(x, p) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if gated:
        q, k = (apply_rope(y, ctx.ropes["default"], "half") for y in (q, k))
    logits, rows = heads(x, mixer.slot_proj), []
    for t in range(T):
        share = logits[:, : t + 1].softmax(1)  # over the tokens so far, slot by slot
        keys = torch.einsum("bshm,bshk->bhmk", share, k[:, : t + 1])
        values = torch.einsum("bshm,bshv->bhmv", share, v[:, : t + 1])
        rows.append(read(q[:, t] / 8**0.5, keys, values))
    o = torch.stack(rows, 1)
    if gated:
        o = rms(o, 1e-5) * mixer.o_norm * F.silu(heads(x, mixer.g_proj))
    near(mixer(x, ctx), mixer.o_proj(o.flatten(-2)))


def test_abc_keeps_large_weights_in_range() -> None:
    mixer, x = made("abc", SIZES).float(), inputs().float()
    with torch.no_grad():
        mixer.slot_proj.weight.mul_(60)  # logits up to several hundred
        found, expected = mixer(x, context()), mixer.double()(inputs(), context())
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("gsa", dict(slots=0), "slots was 0"),
        ("gsa", dict(decay_divisor=0.0), "decay_divisor was 0.0"),
        ("abc", dict(slots=0), "slots was 0"),
        ("abc", dict(gate="gelu"), "gate 'gelu'"),
    ],
)
def test_bad_arguments_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        registry.get("mixers", name, "MODULE").parse({**SIZES, **args}).check(CONFIG)
