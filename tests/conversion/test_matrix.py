"""Mixing matrices against attention written out and against recurrences stepped token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from targets import RECURRENT
from torch import Tensor

import zoo
from zoo import registry
from zoo.architectures.core.mixer import Mixer
from zoo.architectures.core.mixing import mixing_matrix
from zoo.architectures.core.watched import watched
from zoo.conversion.core.convert import convert
from zoo.conversion.core.matrix import Matrix
from zoo.errors import ZooError

IDS = torch.arange(2 * 20).remainder(96).view(2, 20)
PER_HEAD = [name for name in RECURRENT if registry.get("mixers", name, "MODULE").mix_values is not Mixer.mix_values]


def seen(model: Any, layer: int) -> Any:
    with watched(model, [layer]) as found, torch.no_grad():
        model.model(input_ids=IDS, use_cache=False)
    return found[layer]


def converted(source: Path, out: Path, mixer: str) -> tuple[Any, Any]:
    convert(source, out, mixer=mixer, keep=[0, 2], fresh_process=False)
    return zoo.from_pretrained(out, dtype=torch.float64), zoo.from_pretrained(source, dtype=torch.float64)


def attention_matrix(mixer: Any, x: Tensor, ctx: Any) -> Tensor:
    q, k, _ = mixer.expanded_qkv(x, ctx)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)


def test_the_attention_is_at_no_distance_from_itself(hard_llama: Path) -> None:
    model = zoo.from_pretrained(hard_llama, dtype=torch.float64)
    call = seen(model, 1)
    written = attention_matrix(model.model.layers[1].mixer, call.x, call.ctx)
    torch.testing.assert_close(mixing_matrix(model.model.layers[1].mixer, call.x, call.ctx), written)
    assert Matrix(model, model, [0, 1, 2])(IDS).item() == 0.0


@pytest.mark.parametrize("mixer", PER_HEAD)
def test_a_matrix_is_what_values_are_mixed_by(mixer: str, hard_llama: Path, tmp_path: Path) -> None:
    student, teacher = converted(hard_llama, tmp_path / "out", mixer)
    call, module = seen(teacher, 1), student.model.layers[1].mixer
    matrix = mixing_matrix(module, call.x, call.ctx)
    v = torch.randn(2, 20, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("bhts,bshv->bthv", matrix, v)
    torch.testing.assert_close(module.mix_values(call.x, v, call.ctx).to(v.dtype), expected)
    assert not matrix.triu(1).any() and matrix.tril().abs().sum() > 0
    loss = Matrix(student, teacher, [1])(IDS)
    target = attention_matrix(teacher.model.layers[1].mixer, call.x, call.ctx)
    cosine = torch.cosine_similarity(matrix.flatten(-2), target.flatten(-2), dim=-1)
    torch.testing.assert_close(loss, (2 - 2 * cosine).mean())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in module.parameters())


def test_gated_delta_nets_matrix_is_its_recurrence(hard_llama: Path, tmp_path: Path) -> None:
    student, teacher = converted(hard_llama, tmp_path / "out", "gated_delta_net")
    module, call = student.model.layers[1].mixer, seen(teacher, 1)
    q, k, _ = module.expanded_qkv(call.x, call.ctx)
    q, k = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (q, k))
    decay = -module.A_log.exp() * torch.nn.functional.softplus(module.a_proj(call.x) + module.dt_bias)
    beta = module.b_proj(call.x).sigmoid()
    state, rows = torch.zeros(2, 6, 16, 20, dtype=torch.float64), []
    for t in range(20):
        state = state * decay[:, t, :, None, None].exp()
        new = torch.eye(20, dtype=torch.float64)[t] - torch.einsum("bhk,bhks->bhs", k[:, t], state)
        state = state + beta[:, t, :, None, None] * k[:, t, :, :, None] * new[:, :, None]
        rows.append(torch.einsum("bhk,bhks->bhs", q[:, t], state) * 16**-0.5)
    torch.testing.assert_close(mixing_matrix(module, call.x, call.ctx), torch.stack(rows, 2))


def test_mixers_without_a_matrix_are_refused_by_name(hard_llama: Path, tmp_path: Path) -> None:
    convert(hard_llama, tmp_path / "out", mixer="gla", keep_heads={1: [0]}, keep=[0, 2], fresh_process=False)
    student, teacher = zoo.from_pretrained(tmp_path / "out"), zoo.from_pretrained(hard_llama)
    with pytest.raises(ZooError, match="layer 1: HeadHybrid has no matrix per head"):
        Matrix(student, teacher, [1])
