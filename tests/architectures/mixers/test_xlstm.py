"""mLSTM and sLSTM against the paper's formulas, token by token in fp64, without any stabiliser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_models import same, stir

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context

D, T = 12, 18


def built(name: str, args: dict[str, Any]) -> Any:
    """A mixer with random parameters in fp64, gates well open."""
    torch.manual_seed(0)
    cls = registry.get("mixers", name, "MODULE")
    part = cls(DecoderConfig(vocab_size=8, hidden_size=D, layers=()), cls.parse(args)).double()
    stir(part, std=0.4)
    return part


def head_norm(h: Tensor, eps: float) -> Tensor:
    return torch.cat([(row - row.mean()) / (row.var(unbiased=False) + eps).sqrt() for row in h])


def run(part: Any) -> tuple[Tensor, Tensor]:
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, part(x[None], Context(phase="train", positions=torch.arange(T)[None]))[0]


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("bias", [False, True])
def test_mlstm_is_the_papers_formula(cap: float | None, bias: bool) -> None:
    args = {"heads": 2, "head_dim": 3, "value_dim": 5, "gate_softcap": cap, "bias": bias, "norm_eps": 1e-3}
    part = built("mlstm", args)
    x, found = run(part)
    q, k, v = (getattr(part, f"{n}_proj")(x).view(T, 2, -1) for n in "qkv")
    i, f = part.input_gate(x) + part.input_bias, part.forget_gate(x) + part.forget_bias
    if cap is not None:
        i, f = cap * torch.tanh(i / cap), cap * torch.tanh(f / cap)
    memory, normal = torch.zeros(2, 3, 5).double(), torch.zeros(2, 3).double()
    log_forget, rows = torch.nn.functional.logsigmoid(f), []
    for t in range(T):
        h = []
        for j in range(2):
            memory[j] = f[t, j].sigmoid() * memory[j] + i[t, j].exp() * torch.outer(k[t, j], v[t, j])
            normal[j] = f[t, j].sigmoid() * normal[j] + i[t, j].exp() * k[t, j]
            # the stabiliser starts at 0, which makes the bound of 1 on the product decay like a token of weight 1
            top = max(
                [log_forget[: t + 1, j].sum(), *(i[s, j] + log_forget[s + 1 : t + 1, j].sum() for s in range(t + 1))]
            )
            query = q[t, j] / 3**0.5
            bound = torch.maximum((query @ normal[j]).abs(), torch.ones(()).double()) + 1e-6 * top.exp()
            h.append(query @ memory[j] / bound)
        rows.append(head_norm(torch.stack(h), 1e-3) * part.norm_weight)
    same(found, part.o_proj(part.g_proj(x).sigmoid() * torch.stack(rows)), 1e-10)


@pytest.mark.parametrize("conv", [0, 3])
def test_slstm_is_the_papers_formula(conv: int) -> None:
    part = built("slstm", {"heads": 3, "conv": conv, "norm_eps": 1e-3})
    x, found = run(part)
    smooth = x
    if conv:
        padded = torch.cat([torch.zeros(conv - 1, D).double(), x])
        sums = [(padded[t : t + conv].T * part.convs.x).sum(1) + part.convs.x_bias for t in range(T)]
        smooth = torch.nn.functional.silu(torch.stack(sums))
    c, n, h = (torch.zeros(3, 4).double() for _ in range(3))
    rows = []
    for t in range(T):
        for j, at in enumerate(slice(4 * j, 4 * j + 4) for j in range(3)):
            inputs = (smooth[t, at], smooth[t, at], x[t, at], x[t, at])
            i, f, z, o = (
                part.gates[g, j] @ inputs[g] + h[j] @ part.recurrent[g, j] + part.gate_bias[g, j] for g in range(4)
            )
            c[j] = f.sigmoid() * c[j] + i.exp() * z.tanh()
            n[j] = f.sigmoid() * n[j] + i.exp()
            h[j] = o.sigmoid() * c[j] / n[j]
        rows.append(head_norm(h.clone(), 1e-3) * part.norm_weight)
    same(found, torch.stack(rows), 1e-10)


def test_gates_start_as_published() -> None:
    part = built("mlstm", {"heads": 4, "head_dim": 3})
    part.init_weights(0.02)
    assert part.input_bias.tolist() == [-10.0] * 4 and part.forget_bias.tolist() == [3.0, 4.0, 5.0, 6.0]
    part = built("slstm", {"heads": 3, "layer_index": 1, "depth": 2})
    part.init_weights(0.02)
    assert not part.recurrent.any() and not part.gate_bias[[0, 2, 3]].any()
    assert part.gate_bias[1, 0, [0, -1]].tolist() == [5.0, -7.0]
