"""Gates of retrieval heads: what a gate of 0 or 1 means, gradients, and that training lowers its loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo import registry
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.conversion.core import duo_gates
from zoo.errors import ZooError

SINKS, RECENT = 2, 5


def small() -> ZooForCausalLM:
    """Full attention in three layers, random weights, fp64."""
    torch.manual_seed(0)
    model = zoo.create("transformer", preset="tiny").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def swapped(model: ZooForCausalLM, alphas: list[list[float]]) -> ZooForCausalLM:
    """The same weights, with heads that stream or keep all."""
    decoder = model.config.decoder_config
    known = set(registry.get("mixers", "duo_attention", "MODULE").options.__dataclass_fields__)
    layers = []
    for layer, own in zip(decoder.layers, alphas, strict=True):
        args = {name: value for name, value in layer.mixer_args.items() if name in known}
        args |= {"alphas": own, "sinks": SINKS, "budget": SINKS + RECENT}
        layers.append(replace(layer, mixer="duo_attention", mixer_args=args))
    made = ZooForCausalLM(ZooConfig.from_decoder(replace(decoder, layers=tuple(layers)), "test")).double().eval()
    made.load_state_dict(model.state_dict())
    return made


def hidden(model: ZooForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.model(ids, use_cache=False).last_hidden_state


def test_gates_of_0_and_1_are_streaming_and_full_heads() -> None:
    model = small()
    mixers = duo_gates.gated_mixers(model)
    heads = mixers[0].kv_heads
    ids = torch.randint(1, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    alphas = [[float((index + g) % 2) for g in range(heads)] for index in range(len(mixers))]
    gates = {index: torch.tensor(own).double() for index, own in enumerate(alphas)}
    with duo_gates.gated(mixers, gates, SINKS, RECENT):
        found = hidden(model, ids)
    expected = hidden(swapped(model, alphas), ids)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    plain = hidden(model, ids)
    assert (found - plain).abs().max() > 1e-3
    ones = {index: torch.ones(heads).double() for index in mixers}
    with duo_gates.gated(mixers, ones, SINKS, RECENT):
        assert (hidden(model, ids) - plain).abs().max() <= 1e-12 * plain.abs().max()


def test_the_distance_has_the_gradient_of_its_definition() -> None:
    model = small()
    mixers = duo_gates.gated_mixers(model)
    ids = torch.randint(1, 90, (1, 20), generator=torch.Generator().manual_seed(2))
    answers = torch.zeros(1, 20, dtype=torch.bool)
    answers[:, 13:] = True
    gates = {index: torch.full((mixer.kv_heads,), 0.5).double().requires_grad_() for index, mixer in mixers.items()}
    call: Any = (ids, answers, SINKS, RECENT)
    wrong = duo_gates.distance(model, mixers, gates, *call)
    wrong.backward()
    with torch.no_grad(), duo_gates.gated(mixers, gates, SINKS, RECENT):
        changed = hidden(model, ids)
    expected = (changed - hidden(model, ids))[:, 13:].square().mean()
    assert wrong.item() == pytest.approx(expected.item(), rel=1e-5)
    for index, gate in gates.items():
        moved = {**gates, index: gate.detach().clone()}
        moved[index][0] += 1e-3
        step = (duo_gates.distance(model, mixers, moved, *call) - wrong).item() / 1e-3
        assert gate.grad is not None and gate.grad[0].item() == pytest.approx(step, rel=0.05)


def test_training_lowers_the_loss_and_leaves_the_model_alone() -> None:
    model, tokenizer = zoo.from_pretrained("books-llama-4m", dtype=torch.float32), zoo.tokenizer("books-llama-4m")
    before = {name: p.clone() for name, p in model.named_parameters()}
    text = "The old house stood by the river, and nobody came there. It rained all day. " * 40
    batches = list(duo_gates.passkey_batches(tokenizer, text, 128, 1, 1, passkeys=1)) * 5
    seen: list[float] = []
    gates = duo_gates.train_gates(
        model, batches, sinks=2, recent=32, report=lambda step, wrong, opened: seen.append(wrong + 0.05 * opened)
    )
    assert seen[0] == pytest.approx(0.05, rel=1e-4) and all(b < a for a, b in zip(seen, seen[1:], strict=False))
    assert len(gates) == 8 and all(len(own) == 2 for own in gates if own)
    assert len({alpha for own in gates if own for alpha in own}) > 4  # heads differ: it is not the pull to 0 alone
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad
    assert "attend" not in vars(model.model.layers[0].mixer)
    for sparsity, streaming in ((0.0, 0), (0.5, 8), (1.0, 16)):
        options = duo_gates.deployed(gates, sparsity)
        assert sum(a <= own["threshold"] for own in options if own for a in own["alphas"]) == streaming


def test_passkeys_are_asked_for_and_answered() -> None:
    tokenizer = zoo.tokenizer("books-llama-4m")
    text = "The river ran by. Nobody came. It rained. " * 50
    ids, answers = next(duo_gates.passkey_batches(tokenizer, text, 400, 2, 1, seed=3, passkeys=4))
    for row, own in zip(ids, answers, strict=True):
        told, asked = tokenizer.decode(row[: int(own.int().argmax())]), tokenizer.decode(row[own])
        values = [word.strip(".") for word in asked.split() if word.strip(".").isdigit()]
        assert len(values) >= 2 and all(value in told for value in values)
    with pytest.raises(ZooError, match="length was 20"):
        next(duo_gates.passkey_batches(tokenizer, text, 20, 1, 1))


def test_bad_calls_are_refused() -> None:
    model = small()
    with pytest.raises(ZooError, match="no answer tokens"):
        duo_gates.train_gates(model, [(torch.ones(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.bool))])
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ZooError, match="no layer has full softmax attention"):
        duo_gates.train_gates(zoo.create("gla", preset="tiny"), [], steps=1)
    with pytest.raises(ZooError, match="sparsity was 2"):
        duo_gates.deployed([[0.5]], 2)
