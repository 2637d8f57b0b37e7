"""Recall documents: right answers, no eval key, whole documents in every row, the same rows for the same seed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from zoo.conversion.core import recall
from zoo.conversion.core.words import TRAIN_WORDS
from zoo.evals.core import words

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = [f"The {a} {b} of the {c} stood in its place, and nobody asked why." for a, b, c in
             zip(TRAIN_WORDS[:150], TRAIN_WORDS[250:400], TRAIN_WORDS[-150:], strict=True)]  # fmt: skip
TEXT = "\n\n".join(" ".join(SENTENCES[i : i + 5]) for i in range(0, 150, 5))
ANSWERED = re.compile(r"number for (\S+) mentioned in the provided text is (\d+)\.")
PLANTED = re.compile(r"numbers for (\S+) is: (\d{7})\.")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    inner = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT, recall.INTRODUCTION, recall.NEEDLE, recall.QUESTION], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=special[0], pad_token=special[1])


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_eval_words_are_never_trained_on() -> None:
    assert not set(TRAIN_WORDS) & set(words.EVAL_WORDS)
    assert len(set(words.keys())) == len(words.keys()) > 1000
    rng = random.Random(0)
    trained = {part.lower() for _ in range(5000) for part in recall.any_key(rng).split("-")}
    assert not trained & set(words.EVAL_WORDS)


def test_key_value_lists_ask_only_for_lines_they_hold() -> None:
    rng = random.Random(1)
    sizes, framed = set(), 0
    for _ in range(200):
        document = recall.key_value_list(rng)
        framed += document.startswith(recall.LIST_OPENING)
        listed, asked = parts(document)
        assert 4 <= len(listed) <= 40 and 3 <= len(asked) <= 12
        assert set(asked) <= set(listed) and len(set(asked)) == len(asked)
        assert len({re.split(": | = | -> ", line)[0] for line in listed}) == len(listed)
        sizes.add(len(listed))
    assert len(sizes) > 25 and 120 < framed < 180
    for _ in range(20):
        listed, asked = parts(recall.key_value_list(rng, every=True))
        assert sorted(asked) == sorted(listed) and asked != listed


def test_needle_documents_answer_what_they_planted() -> None:
    rng, counts = random.Random(2), set()
    for _ in range(200):
        document = recall.needle_document(rng, SENTENCES, 900)
        planted, answered = PLANTED.findall(document), ANSWERED.findall(document)
        assert len(dict(planted)) == len(planted) and 1 <= len(answered) <= min(3, len(planted))
        assert all(dict(planted)[key] == value for key, value in answered)
        assert document.endswith(f" {answered[-1][1]}.")
        counts.add(len(planted))
    assert counts == {1, 2, 3, 4, 6, 8}


def test_needles_lie_at_every_depth() -> None:
    rng = random.Random(3)
    stacks = [recall.haystack(rng, SENTENCES, ["NEEDLE"], 2000) for _ in range(300)]
    depths = [stack.index("NEEDLE") / len(stack) for stack in stacks]
    assert min(depths) < 0.05 and max(depths) > 0.9 and 0.4 < sum(depths) / 300 < 0.6


def test_sentences_lose_no_character() -> None:
    text = 'He said "Stop!" and left. (Really?) Yes.\n\nThen   no end'
    assert recall.sentences(text) == ['He said "Stop!"', "and left.", "(Really?)", "Yes.", "Then no end"]


def test_rows_hold_whole_documents_and_repeat_with_the_seed(tokenizer: Any) -> None:
    rows = list(islice(recall.recall_rows(TEXT, tokenizer, 700, 4), 30))
    again = list(islice(recall.recall_rows(TEXT, tokenizer, 700, 4), 30))
    other = list(islice(recall.recall_rows(TEXT, tokenizer, 700, 5), 30))
    assert all((a == b).all() for a, b in zip(rows, again, strict=True))
    assert not any((a == b).all() for a, b in zip(rows, other, strict=True))
    documents = 0
    for row in rows:
        assert row.shape == (700,) and row.dtype == np.int32 and row[0] == tokenizer.eos_token_id
        ends = np.flatnonzero(row == tokenizer.eos_token_id)
        for start, stop in zip(ends, ends[1:], strict=False):
            text = tokenizer.decode(row[start + 1 : stop].tolist())
            assert whole(text), text
            documents += 1
    assert documents > 40


def parts(document: str) -> list[list[str]]:
    """The lines of a key-value list, and those asked again, in either form."""
    document = document.removeprefix(f"{recall.LIST_OPENING}\n").replace(f"\n{recall.LIST_QUESTION}\n", "\n\n")
    return [part.split("\n") for part in document.split("\n\n")]


def whole(text: str) -> bool:
    if text.startswith(recall.INTRODUCTION):
        return dict(ANSWERED.findall(text)).items() <= dict(PLANTED.findall(text)).items() and text.endswith(".")
    listed, asked = parts(text)
    return len(asked) >= 3 and set(asked) <= set(listed)


def test_repeat_rows_have_the_period_of_their_span() -> None:
    text = list(range(100, 900))
    for seed in range(40):
        row = recall.repeat_row(random.Random(seed), text, 1000, 600)
        periods = [p for p in range(12, 401) if (row[p:] == row[:-p]).all()]
        assert periods and row.shape == (600,) and row.min() >= 2 and row.max() < 1000


def test_probe_answers_can_be_copied_from_the_prompt(tokenizer: Any) -> None:
    rng, keys = random.Random(6), words.keys()
    probes = [recall.needle_probe(rng, SENTENCES, keys, tokenizer, 400) for _ in range(10)]
    assert all(300 < len(probe.ids) <= 400 for probe in probes)
    probes += [recall.key_value_probe(rng, keys, tokenizer, 12) for _ in range(10)]
    for probe in probes:
        answer, prompt = probe.ids[probe.start :], probe.ids[: probe.start]
        assert re.fullmatch(r" \d{7}", tokenizer.decode(answer))
        assert any(prompt[i : i + len(answer)] == answer for i in range(len(prompt)))


def test_accuracy_is_one_for_an_oracle_and_falls_with_one_wrong_digit(tokenizer: Any) -> None:
    rng = random.Random(7)
    probes = [recall.needle_probe(rng, SENTENCES, words.keys(), tokenizer, n) for n in (256, 300, 350, 400)]
    assert recall.answer_accuracy(lambda rows: np.roll(rows, -1, axis=1), probes) == 1.0

    def wrong_once(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        guesses = np.roll(rows, -1, axis=1)
        guesses[2, len(probes[2].ids) - 2] += 1
        return guesses

    assert recall.answer_accuracy(wrong_once, probes) == 0.75
    assert recall.answer_accuracy(lambda rows: rows, probes) == 0.0


def test_a_probe_that_cannot_fit_says_so(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="length must hold the needle and its question"):
        recall.needle_probe(random.Random(0), SENTENCES, words.keys(), tokenizer, 40)


def test_pieces_tokenise_like_the_whole(tokenizer: Any) -> None:
    data = load_example("pretrain_data")
    stream = data.tokenize([TEXT, TEXT[:500]], tokenizer)
    whole_text = [0, *tokenizer(TEXT)["input_ids"], 0, *tokenizer(TEXT[:500])["input_ids"]]
    assert stream.tolist() == whole_text
    assert len(list(data.pieces(TEXT, 1000))) > 5 and "".join(data.pieces(TEXT, 1000)) == TEXT
    parts = [i for piece in data.pieces(TEXT, 1000) for i in tokenizer(piece)["input_ids"]]
    assert parts == whole_text[1 : len(parts) + 1]


@pytest.mark.slow
def test_pretrain_runs_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("<|endoftext|>".join([TEXT] * 4))
    command = [sys.executable, "examples/pretrain.py", "--text", f"{tmp_path}/text.txt", "--cache", f"{tmp_path}/cache",
               "--out", f"{tmp_path}/out", "--preset", "tiny", "--vocab", "512", "--length", "288", "--batch", "4",
               "--steps", "12", "--pool", "0.02", "--workers", "1", "--log-every", "2", "--lr", "0.01", "--probes", "2",
               "--final-probes", "2", "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    losses = [entry["books"] for entry in log if "books" in entry]
    assert losses[-1] < losses[0]
    assert set(json.loads((tmp_path / "out/results.json").read_text())) >= {"books_nll", "needle_256"}
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 512 and model.dtype.is_floating_point
