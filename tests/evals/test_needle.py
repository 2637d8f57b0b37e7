"""Needle prompts are what they claim to be, and models whose recall is known get the score that they deserve."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from zoo.errors import ZooError
from zoo.evals import needle
from zoo.evals.core import decoding
from zoo.evals.core.haystack import DEPTHS, Haystack, split_sentences
from zoo.evals.core.words import keys

NEEDLE = re.compile(r"One of the special magic numbers for (\S+) is: (\d{7})\.")


def prompts(tokenizer: Any, text: Path, length: int, samples: int, seed: int = 0) -> list[tuple[Any, str]]:
    haystack = Haystack(text.read_text(), tokenizer)
    questions = haystack.questions(keys(), length, samples, seed)
    fitted = haystack.prompts(questions, length)
    return [(question, tokenizer.decode(ids)) for question, ids in zip(questions, fitted, strict=True)]


@pytest.mark.parametrize("length", [600, 1024, 4000, 30000])
def test_prompts_fill_their_length_to_one_percent(tokenizer: Any, text: Path, length: int) -> None:
    haystack = Haystack(text.read_text() * 2, tokenizer)
    fitted = haystack.prompts(haystack.questions(keys(), length, 6, 0), length)
    assert all(0.99 * length <= len(ids) <= length for ids in fitted)


def test_the_needle_is_there_at_its_depth(tokenizer: Any, text: Path) -> None:
    for question, prompt in prompts(tokenizer, text, 3000, 12):
        assert NEEDLE.findall(prompt) == [(question.key, question.value)]
        context = prompt.split("\n")[1]
        before = NEEDLE.split(context)[0]
        sentences = len(split_sentences(NEEDLE.sub("", context).split()))
        assert len(split_sentences(before.split())) == int(sentences * question.depth / 100)
        assert prompt.endswith(f"The special magic number for {question.key} mentioned in the provided text is")


def test_samples_do_not_depend_on_how_many_there_are(tokenizer: Any, text: Path) -> None:
    few, many = (prompts(tokenizer, text, 1000, n) for n in (3, 9))
    assert few == many[:3]
    assert prompts(tokenizer, text, 1000, 3, seed=1) != few
    assert len({question.depth for question, _ in prompts(tokenizer, text, 1000, 60)} & set(DEPTHS)) > 15


def test_special_tokens_in_the_text_stay_out_of_the_haystack(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "books.txt"
    path.write_text("A book ends here.<|endoftext|>Another starts. " * 200)
    assert all("<|endoftext|>" not in prompt for _, prompt in prompts(tokenizer, path, 2000, 3))


def test_an_oracle_scores_one_and_silence_zero(needle_oracle: Any, tokenizer: Any, text: Path, llama: Any) -> None:
    result = needle.evaluate(needle_oracle(), tokenizer, data=text, lengths=[600, 1200], samples=7)
    for length in (600, 1200):
        row = result.row("accuracy", length=length)
        assert (row.value, row.n, row.stderr) == (1.0, 7, 0.0)
        assert row.ci95 is not None and row.ci95 == pytest.approx((1 / (1 + 1.959964**2 / 7), 1.0))
        assert result.value("first_number", length=length) == 1.0
    assert needle.evaluate(llama, tokenizer, data=text, lengths=[600], samples=4).value("accuracy", length=600) == 0.0


def test_a_model_of_the_last_tokens_scores_the_share_within_them(
    needle_oracle: Any, tokenizer: Any, text: Path
) -> None:
    window, length, samples = 900, 1600, 40
    model = needle_oracle(window)
    got = needle.evaluate(model, tokenizer, data=text, lengths=[length], samples=samples).value("accuracy")
    max_new = decoding.answer_tokens(tokenizer, ["1234567"], needle.SLACK)
    haystack = Haystack(text.read_text(), tokenizer)
    questions = haystack.questions(keys(), length, samples, 0)
    visible = [tokenizer.decode(ids[-window:]) for ids in haystack.prompts(questions, length - max_new)]
    inside = [f"magic numbers for {q.key} is: {q.value}." in seen for q, seen in zip(questions, visible, strict=True)]
    assert got == sum(inside) / samples
    assert 0.1 < got < 0.9


def test_the_batch_changes_nothing_and_nothing_is_padded(needle_oracle: Any, tokenizer: Any, text: Path) -> None:
    alone, together = needle_oracle(700), needle_oracle(700)
    arguments: dict[str, Any] = {"data": text, "lengths": [900], "samples": 20}
    first = needle.evaluate(alone, tokenizer, **arguments, batch_tokens=1)
    second = needle.evaluate(together, tokenizer, **arguments)
    assert first.rows == second.rows
    assert max(shape[0] for shape in alone.shapes) == 1 < max(shape[0] for shape in together.shapes)


def test_answers_of_a_real_cache_equal_generate(llama: Any, tokenizer: Any) -> None:
    import torch

    ids = [tokenizer(prompt)["input_ids"] for prompt in ("a river", "a stone", "trees and men")]
    got = decoding.answers(llama, tokenizer, [decoding.Continue(prompt, max_new=9) for prompt in ids])
    for prompt, answer in zip(ids, got, strict=True):
        x = torch.tensor([prompt])
        whole = llama.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=9, do_sample=False, eos_token_id=None
        )
        assert tokenizer.decode(whole[0, len(prompt) :]) == answer


def test_decoding_stops_when_every_answer_is_there(needle_oracle: Any, tokenizer: Any, text: Path) -> None:
    model = needle_oracle()
    needle.evaluate(model, tokenizer, data=text, lengths=[600], samples=1)
    assert len(model.shapes) == len(" 1234567")


def test_scores_are_rulers() -> None:
    assert decoding.contains(" it is 1234567, I think", "1234567")
    assert decoding.contains("Yes:\x00ABC-def", "abc-DEF")
    assert not decoding.contains(" 123456 7", "1234567")
    assert decoding.first_number(" it is 12, not 1234567") == "12"
    assert decoding.first_number("none") == ""


def test_evaluation_is_deterministic(llama: Any, tokenizer: Any, text: Path) -> None:
    first, second = (needle.evaluate(llama, tokenizer, data=text, lengths=[600], samples=3) for _ in range(2))
    assert (first.rows, first.options, first.series) == (second.rows, second.options, second.series)


def test_default_lengths_fit_the_model(make_llama: Any) -> None:
    assert needle.default_lengths(make_llama(max_position_embeddings=1900)) == (256, 512, 1024)
    with pytest.raises(ZooError, match="at most 100"):
        needle.default_lengths(make_llama(max_position_embeddings=100))


def test_bad_input_is_one_line(llama: Any, tokenizer: Any, text: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Short. Very short.")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": text, "lengths": [4096]}, "length 4096 is beyond the model's 2048"),
        ({"data": text, "lengths": [100]}, "needs at least"),
        ({"data": text, "samples": 0}, "samples was 0"),
        ({"data": tmp_path / "short.txt", "lengths": [2000]}, "cannot be filled from 3 words"),
        ({"lengths": [256]}, "pass --data"),
    ]
    for options, message in cases:
        with pytest.raises(ZooError, match=message) as caught:
            needle.evaluate(llama, tokenizer, **options)
        assert "\n" not in str(caught.value)
