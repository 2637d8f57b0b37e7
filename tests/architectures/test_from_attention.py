"""Mixers made from softmax attention: the plan is complete, the transfer exact, and nothing new is dead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from zoo_models import ROPES, SPEC, convertible, same, stir

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context, Mixer
from zoo.architectures.core.operations import OPERATIONS, initial
from zoo.architectures.core.plan import MixerPlan
from zoo.architectures.core.rope import RotaryTable
from zoo.errors import ZooError

CONFIG = DecoderConfig(vocab_size=97, hidden_size=64, layers=(), ropes=ROPES)
HEADS: list[tuple[int, ...] | None] = [None, (3, 0, 1)]


def context(tokens: int) -> Context:
    positions = torch.arange(tokens)[None]
    ropes = {name: RotaryTable(rope, 2048)(positions) for name, rope in ROPES.items()}
    return Context(phase="train", positions=positions, ropes=ropes)


def source() -> Mixer:
    """Softmax attention with everything that has to be transferred."""
    cls = registry.get("mixers", "attention", "MODULE")
    module = cls(CONFIG, cls.parse(SPEC.args))
    stir(module, seed=5, std=0.3)
    return module


def transfer(name: str, heads: tuple[int, ...] | None) -> tuple[Mixer, MixerPlan, Mixer]:
    """The source, the plan and the mixer that the plan makes of the source."""
    attention, cls = source(), registry.get("mixers", name, "MODULE")
    plan = cls.from_attention(SPEC, heads)
    module = cls(CONFIG, cls.parse(plan.args))
    state = {
        row.target: OPERATIONS[row.operation]([attention.get_parameter(row.source)], **row.options) for row in plan.rows
    }
    state |= {init.target: initial(init, f"layers.0.{init.target}", 0) for init in plan.inits}
    module.load_state_dict(state, strict=True)
    return attention, plan, module


def softmax_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal softmax over `[B, T, H, K]`, heads side by side."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


def cases(mixer: str) -> list[tuple[int, ...] | None]:
    if not convertible(mixer):
        return []
    return HEADS if registry.get("mixers", mixer, "MODULE").by_head else HEADS[:1]


def test_a_plan_names_every_tensor_once_with_its_shape(mixer: str) -> None:
    for heads in cases(mixer):
        _, plan, module = transfer(mixer, heads)
        targets = [row.target for row in plan.rows] + [init.target for init in plan.inits]
        tensors = module.state_dict(keep_vars=True)
        assert sorted(targets) == sorted(tensors)
        for init in plan.inits:
            kept = getattr(tensors[init.target], "_zoo_fp32", False)
            assert tuple(init.shape) == tuple(tensors[init.target].shape)
            assert init.fp32 == kept, init.target


def test_softmax_over_the_transferred_projections_is_the_source(mixer: str) -> None:
    x, ctx = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(2)), context(20)
    for heads in cases(mixer):
        attention, _, module = transfer(mixer, heads)
        q, k, v = attention.queries(x, ctx)[0], *attention.keys_values(x, ctx)
        expected = softmax_output(q, *(part[:, :, [h // SPEC.group for h in range(SPEC.heads)]] for part in (k, v)))
        kept = list(range(SPEC.heads)) if heads is None else list(heads)
        same(softmax_output(*module.expanded_qkv(x, ctx)), expected[:, :, kept])


def test_the_source_is_what_the_op_computes() -> None:
    attention, x, ctx = source(), torch.randn(2, 20, 64), context(20)
    same(attention(x, ctx), attention.o_proj(softmax_output(*attention.expanded_qkv(x, ctx)).flatten(-2)))


def test_the_output_projection_is_the_sources(mixer: str) -> None:
    for heads in cases(mixer):
        attention, plan, module = transfer(mixer, heads)
        (row,) = [row for row in plan.rows if row.source == "o_proj.weight"]
        found, columns = module.get_parameter(row.target), attention.o_proj.weight.unflatten(1, (SPEC.heads, -1))
        kept = list(range(SPEC.heads)) if heads is None else list(heads)
        assert torch.equal(found, columns[:, kept].flatten(1))
        assert isinstance(module.get_submodule(row.target.rpartition(".")[0]), nn.Linear)


def test_new_parameters_start_with_a_gradient(mixer: str) -> None:
    x, target = (torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(s)) for s in (2, 3))
    for heads in cases(mixer):
        _, _, module = transfer(mixer, heads)
        loss = (module(x, context(20)) - target).square().mean()
        loss.backward()
        dead = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
        assert torch.isfinite(loss) and not dead


def test_what_cannot_be_transferred_is_refused(mixer: str) -> None:
    cls = registry.get("mixers", mixer, "MODULE")
    if not convertible(mixer):
        with pytest.raises(ZooError, match="cannot be made from softmax attention"):
            cls.from_attention(SPEC)
    elif cls.by_head:
        gated = replace(SPEC, args={**SPEC.args, "output_gate": True})
        with pytest.raises(ZooError, match="output_gate"):
            cls.from_attention(gated)
    else:
        with pytest.raises(ZooError, match="heads"):
            cls.from_attention(SPEC, (0,))
