"""Text tasks: solvers that read the whole prompt, guess, or read its last bytes; prompts are what they claim to be."""

from __future__ import annotations

import json
import math
import random
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import Scripted

from zoo.errors import ZooError
from zoo.evals import json_kv, passkey, phonebook, symbolic, variable_tracking
from zoo.evals.core.questions import DEPTHS, Question
from zoo.evals.core.text import encode

MISS = " none"


@dataclass(frozen=True)
class Case:
    """A task with small options, its questions, and who can do it.

    `solve(text)` gives the answer and what has to be in the text for it (None: it does not follow from the text), and
    `guesses(text)` the answers that a model without memory chooses from.
    """

    task: Any
    options: dict[str, Any]
    question: Callable[[Any, int], Question]
    solve: Callable[[str], tuple[str, str] | None]
    guesses: Callable[[str], list[str]]
    window: int
    samples: int = 20

    def score(self, tokenizer: Any, answer: Callable[[str], str], window: int | None = None, **options: Any) -> Any:
        model = Scripted(tokenizer, answer, window)
        return self.task.evaluate(model, tokenizer, **{"samples": self.samples, **self.options, **options})

    def known(self, text: str) -> str:
        found = self.solve(text)
        return MISS if found is None else f" {found[0]}\n"


def one(pattern: str, text: str) -> tuple[str, str] | None:
    found = re.search(pattern, text, re.MULTILINE)
    return (found.group(1), found.group()) if found else None


def pair(text: str) -> tuple[str, str] | None:
    return one(f'"{re.escape(text.rsplit("Key: ", 1)[-1][1:37])}": "([^"]*)"', text)


def entry(text: str) -> tuple[str, str] | None:
    return one(rf"^{text.rsplit(chr(10), 1)[-1]} (\d+)$", text)


def followed(text: str) -> tuple[str, str] | None:
    """The number that a variable got, through every line between."""
    lines = {name: (source, line) for line, name, source in re.findall(r"^(VAR (\w+) = (?:VAR )?(\w+))$", text, re.M)}
    name, line = text.split()[-2], ""
    while name in lines:
        name, line = lines[name]
    return (name, line) if name.isdigit() else None


def computed(text: str) -> tuple[str, str] | None:
    """Python's value of the chain."""
    values: dict[str, Any] = {}
    lines = re.findall(r"^[a-z] = .*\d$", text, re.MULTILINE)
    try:
        exec("\n".join(lines), {}, values)
    except NameError:
        return None
    return (str(values[text[text.rindex("\n") + 1]] % 10), lines[0]) if lines else None


CASES = {
    "passkey": Case(
        passkey, {"lengths": [1000]}, lambda tokenizer, i: passkey.question(tokenizer, 1000, DEPTHS[i % 5], i, 0),
        lambda text: one(r"The pass key is (\d+)\. Remember", text), lambda text: ["123"], 500,
    ),
    "json_kv": Case(
        json_kv, {"pairs": [6]}, lambda tokenizer, i: json_kv.question(6, DEPTHS[i % 5], i, 0), pair,
        lambda text: re.findall(r': "(.{36})"', text), 350,
    ),
    "phonebook": Case(
        phonebook, {"entries": [20]}, lambda tokenizer, i: phonebook.question(20, i, 0), entry,
        lambda text: re.findall(r"\d{10}", text.split("\n\n")[0]), 300,
    ),
    "variable_tracking": Case(
        variable_tracking, {"hops": [2]}, lambda tokenizer, i: variable_tracking.question(2, 4, i, 0), followed,
        lambda text: re.findall(r"\d{5}", text), 250,
    ),
    "symbolic": Case(
        symbolic, {"steps": [3]}, lambda tokenizer, i: symbolic.question(3, i, 0), computed,
        lambda text: [str(digit) for digit in range(10)], 39,
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each_case
def test_an_oracle_scores_one(case: Case, tokenizer: Any) -> None:
    result = case.score(tokenizer, case.known)
    assert {row.value for row in result.rows} == {1.0} and result.rows[0].n == case.samples
    for i, record in enumerate(result.records):
        assert record.prompt == case.question(tokenizer, i).text and list(record.answers) == [
            record.output.split()[0].strip('"')
        ]


@each_case
def test_a_guess_scores_chance(case: Case, tokenizer: Any) -> None:
    samples = 30
    found = [case.guesses(case.question(tokenizer, i).text) for i in range(samples)]
    p = 1 / 50_000 if case.task is passkey else 1 / len(found[0])
    assert len({len(guesses) for guesses in found}) == 1
    # the guess depends on the text alone, so that an answer of several tokens is of one piece
    result = case.score(tokenizer, lambda text: f" {random.Random(text).choice(case.guesses(text))}\n", samples=samples)
    assert abs(result.value("accuracy") - p) * samples <= 2.6 * math.sqrt(samples * p * (1 - p)) + 0.5  # 99%


@each_case
def test_a_short_memory_scores_the_share_within_it(case: Case, tokenizer: Any) -> None:
    texts = [case.question(tokenizer, i).text for i in range(case.samples)]
    needed = [found[1] for found in map(case.solve, texts) if found is not None]
    inside = [part in text[-case.window :] for part, text in zip(needed, texts, strict=True)]
    got = case.score(tokenizer, case.known, case.window).value("accuracy")
    assert got == pytest.approx(sum(inside) / case.samples, abs=1e-12)
    assert 0 < got < 1 or case.task is symbolic  # whose prompts of one number of steps have one length: below


def test_a_short_memory_holds_chains_of_some_steps(tokenizer: Any) -> None:
    case = CASES["symbolic"]
    result = case.score(tokenizer, case.known, case.window, steps=[1, 2, 3, 4, 8])
    assert [row.value for row in result.select("accuracy")] == [1, 1, 1, 0, 0]
    answers = [int(symbolic.question(8, i, 0).answer) for i in range(2000)]
    spread = sum((answers.count(digit) - 200) ** 2 / 200 for digit in range(10))
    assert spread < 27.9  # chi-square of 9 degrees of freedom, 0.1%: every digit is as likely after any steps


@each_case
def test_samples_do_not_depend_on_how_many_there_are(case: Case, tokenizer: Any) -> None:
    runs = [(2, 0), (4, 0), (2, 1)]
    few, many, other = (case.score(tokenizer, str, samples=n, seed=seed).records for n, seed in runs)
    assert few == many[:2] and len({record.prompt for record in [*many, *other]}) == 6


@pytest.mark.parametrize("length", [700, 1500, 4000])
def test_passkey_prompts_fill_their_length_and_hide_the_key_at_its_depth(tokenizer: Any, length: int) -> None:
    for i, depth in enumerate(DEPTHS):
        asked = passkey.question(tokenizer, length, depth, i, 0)
        room = len(encode(tokenizer, " 50000")) + passkey.SLACK
        assert 0.99 * length <= len(encode(tokenizer, asked.text)) + room <= length
        opening, before, needle, after, closing = asked.text.split("\n")
        assert (opening, closing) == (passkey.TASK, "What is the pass key? The pass key is")
        assert needle == f"The pass key is {asked.answer}. Remember it. {asked.answer} is the pass key."
        words, rest = len(before.split()), len(after.split())
        assert words == (words + rest) * depth // 100 and 1 <= int(asked.answer) <= 50_000
        assert (passkey.FILLER + " ").startswith(before[: len(passkey.FILLER)])


def test_objects_are_json_and_the_key_is_at_its_depth() -> None:
    for depth, place in ((0, 0), (25, 10), (50, 20), (75, 30), (100, 40)):
        asked = json_kv.question(41, depth, 3, 0)
        data, key = re.findall(r"JSON data:\n(.*)\n\nKey: (.*)\nCorresponding value:$", asked.text, re.DOTALL)[0]
        held = json.loads(data)
        assert len(held) == 41 and list(held).index(json.loads(key)) == place and held[json.loads(key)] == asked.answer
        assert all(uuid.UUID(name).version == 4 for pair in held.items() for name in pair)


def test_books_have_two_examples_and_no_name_twice() -> None:
    for i in range(10):
        asked = phonebook.question(30, i, 0)
        book, shown, name = (part.split("\n") for part in asked.text.split("\n\n"))
        assert len(book) == 30 == len({line.split(":")[0] for line in book}) and len(shown) == 2
        assert set(shown) < set(book) and f"{name[0]} {asked.answer}" in set(book) - set(shown)
        assert all(re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+: [6-9]\d{9}", line) for line in book)


def test_programs_pass_every_number_on_in_order() -> None:
    for i in range(10):
        asked = variable_tracking.question(3, 4, i, 0)
        values: dict[str, str] = {}
        for line in asked.text.split("\n")[:-2]:
            name, source = re.fullmatch(r"VAR ([A-Z]{3}) = (?:VAR )?(\w+)", line).groups()  # type: ignore[union-attr]
            assert name not in values
            values[name] = source if source.isdigit() else values[source]  # defined by then
        assert [list(values.values()).count(value) for value in sorted(set(values.values()))] == [4] * 4
        assert values[asked.text.split()[-2]] == asked.answer
        assert f"= VAR {asked.text.split()[-2]}\n" not in asked.text  # the last of its chain


@pytest.mark.parametrize(
    ("output", "value", "score", "right"),
    [
        (" 123. Remember it", "123", passkey.is_key, True),
        (" 1234", "123", passkey.is_key, False),
        (" 0, not 123", "123", passkey.is_key, False),
        ("  6204417795 ", "6204417795", phonebook.is_number, True),
        (" 62044177951", "6204417795", phonebook.is_number, False),
        (" 31415.", "31415", variable_tracking.is_value, True),
        (" 31415.", "3", variable_tracking.is_value, False),
        ("", "3", symbolic.is_value, False),
        (" 13", "3", symbolic.is_value, False),
    ],
)
def test_scores(output: str, value: str, score: Callable[[str, str], bool], right: bool) -> None:
    assert score(output, value) is right


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (passkey, {"lengths": [4096]}, "length 4096 is beyond the model's 2048"),
        (passkey, {"lengths": [200]}, "its shortest prompt has 247 tokens, 190 are left"),
        (passkey, {"depths": [101]}, r"depths was \[101\]; it must be percents"),
        (passkey, {"depths": []}, r"depths was \[\]"),
        (json_kv, {"pairs": [0]}, "pairs was 0; it must be between 1 and"),
        (json_kv, {"pairs": [60]}, "beyond the model's 2048"),
        (phonebook, {"entries": [2]}, "entries was 2; it must be between 3 and"),
        (phonebook, {"entries": [100_000]}, "entries was 100000"),
        (variable_tracking, {"hops": [-1]}, "hops was -1; it must be between 0 and 249"),
        (variable_tracking, {"chains": 0}, "chains was 0; it must be at least 1"),
        (symbolic, {"steps": [26]}, "steps was 26; it must be between 0 and 25"),
        (symbolic, {"samples": 0}, "samples was 0"),
        (symbolic, {"steps": []}, r"steps was \[\]; give at least one"),
    ],
)
def test_bad_options_are_one_line(llama: Any, tokenizer: Any, task: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message) as caught:
        task.evaluate(llama, tokenizer, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(ZooError, match="tokenizer"):
        task.evaluate(llama, None)
