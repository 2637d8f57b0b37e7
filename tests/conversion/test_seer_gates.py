"""SeerAttention's gates learn from the attention of the model itself, which stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import zoo
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.conversion.core.seer_gates import block_maxima, shares, train_gates
from zoo.errors import ZooError

BLOCK = 16
ARGS = dict(block=BLOCK, gate_dim=16, budget=2 * BLOCK)


def gated(sharp: float = 3.0) -> ZooForCausalLM:
    """A random model whose attention is far from even."""
    config = zoo.config("transformer", preset="tiny").to_dict()
    for layer in config["layers"]:
        layer["mixer"], layer["mixer_args"] = "seer_attention", layer["mixer_args"] | ARGS
    torch.manual_seed(0)
    model = ZooForCausalLM(ZooConfig.from_dict(config)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.q_proj.weight.mul_(sharp * 5)
            layer.mixer.k_proj.weight.mul_(sharp * 5)
    return model


def texts(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 256, (2, 7 * BLOCK - 3), generator=generator) for _ in range(count)]


def test_gates_learn_and_the_model_stays(tmp_path: Path) -> None:
    model, ids = gated(), texts(1, seed=9)[0]
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="train_gates"):
        model(ids)
    losses = train_gates(model, texts(16), lr=1e-2, budget=3 * BLOCK)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(weight.requires_grad for layer in model.model.layers for weight in layer.mixer.gates.buffers())
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = ZooForCausalLM.from_pretrained(tmp_path)
    assert {layer["mixer_args"]["budget"] for layer in loaded.config.layers} == {3 * BLOCK}
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)


def test_targets_are_the_largest_weights_of_blocks() -> None:
    q, k = (torch.randn(1, 50, heads, 8, generator=torch.Generator().manual_seed(heads)).double() for heads in (4, 2))
    found = block_maxima(q[:, 32:48], k[:, :48], torch.arange(32, 48)[None], BLOCK, 2, None)
    scores = torch.einsum("ihk,jhk->hij", q[0, 32:48], k[0, :48].repeat_interleave(2, 1)) * 8**-0.5
    weights = scores.masked_fill(torch.arange(48) > torch.arange(32, 48)[:, None], -torch.inf).softmax(-1)
    for h in range(4):
        for i in range(16):
            expected = [weights[h, i, c * BLOCK : (c + 1) * BLOCK].max().item() for c in range(2)]
            assert found[0, h, i].tolist() == pytest.approx(expected)
    together, alone = shares(found, "prefill", 2), shares(found, "decode", 2)
    assert together.shape == (1, 4, 1, 2) and alone.shape == (1, 2, 16, 2)
    largest = found[0, 2:, 5].amax(0)
    assert alone[0, 1, 5].tolist() == pytest.approx((largest / largest.sum()).tolist())


def test_what_cannot_be_learned_is_refused() -> None:
    model = gated()
    with pytest.raises(ZooError, match="three blocks"):
        train_gates(model, [torch.ones(1, 2 * BLOCK, dtype=torch.long)])
    with pytest.raises(ZooError, match="no batches"):
        train_gates(model, [])
    with pytest.raises(ZooError, match="seer_attention"):
        train_gates(zoo.create("transformer", preset="tiny"), texts(1))
    assert not model.model.layers[0].mixer.learning and not model.config.layers[0]["mixer_args"].get("trained")
