"""KL and agreement: zero against itself, right against a plain computation, refused across vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.errors import ZooError
from zoo.evals import fidelity


def test_a_model_is_its_own_twin(llama: Any, tokenizer: Any, text: Path) -> None:
    result = fidelity.evaluate(llama, tokenizer, teacher=llama, data=text, length=64, windows=3)
    assert result.value("kl") == 0.0
    assert result.value("top1_agreement") == 1.0
    assert all(row.value == 0.0 for row in result.select("position_kl"))


def test_equals_a_plain_computation(llama: Any, make_llama: Any, tokenizer: Any, text: Path) -> None:
    teacher = make_llama(seed=1)
    result = fidelity.evaluate(llama, tokenizer, teacher=teacher, data=text, length=32, windows=4)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])[: 4 * 32].view(4, 32)
    with torch.no_grad():
        p, q = (model(ids).logits.double().softmax(-1) for model in (teacher, llama))
    assert result.value("kl") == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert result.value("top1_agreement") == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result.value("kl") > 0.1


def test_directions(llama: Any, make_llama: Any, tokenizer: Any, text: Path) -> None:
    other = make_llama(seed=1)
    arguments: dict[str, Any] = {"data": text, "length": 32, "windows": 4}
    there = fidelity.evaluate(llama, tokenizer, teacher=other, **arguments)
    back = fidelity.evaluate(other, tokenizer, teacher=llama, **arguments)
    assert there.value("top1_agreement") == back.value("top1_agreement")
    assert there.value("kl") > 0 and back.value("kl") > 0 and there.value("kl") != back.value("kl")


def test_the_docstring_example() -> None:
    teacher, student = (torch.tensor([[p]]).log() for p in ([0.5, 0.5], [0.25, 0.75]))
    kl, agree = fidelity.divergence(teacher, student)
    assert kl.item() == pytest.approx(0.1438, abs=1e-4)


def test_tokens_that_the_teacher_rules_out_add_nothing() -> None:
    teacher = torch.tensor([[[0.0, 0.0, -torch.inf]]])
    student = torch.tensor([[[0.0, 0.0, -torch.inf]]])
    assert fidelity.divergence(teacher, student)[0].item() == 0.0


def test_chunks_change_nothing(monkeypatch: Any) -> None:
    teacher, student = torch.randn(2, 3, 7, 258)
    whole = fidelity.divergence(teacher, student)
    monkeypatch.setattr(fidelity, "_CHUNK", 258 * 4)
    for part, expected in zip(fidelity.divergence(teacher, student), whole, strict=True):
        torch.testing.assert_close(part, expected)


def test_logits_in_half_precision_are_compared_in_fp32(make_llama: Any, tokenizer: Any, text: Path) -> None:
    teacher, student = make_llama(), make_llama().bfloat16()
    result = fidelity.evaluate(student, tokenizer, teacher=teacher, data=text, length=64, windows=2)
    assert 0 < result.value("kl") < 0.05
    assert result.dtype == "bfloat16"


def test_bad_input_is_one_line(llama: Any, make_llama: Any, tokenizer: Any, text: Path) -> None:
    short = make_llama(max_position_embeddings=64)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "pass --teacher"),
        ({"teacher": make_llama(vocab_size=300)}, "300 tokens and the model 258"),
        ({"teacher": short, "length": 128}, "beyond the model's 64"),
    ]
    for options, message in cases:
        with pytest.raises(ZooError, match=message):
            fidelity.evaluate(llama, tokenizer, data=text, **options)
    with pytest.raises(ZooError, match="pass --data"):
        fidelity.evaluate(llama, tokenizer, teacher=llama)
