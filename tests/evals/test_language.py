"""Language tasks: prompts to the letter, and scores against formulas written out token by token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.errors import ZooError
from zoo.evals import arc_easy, boolq, copa, gsm8k, lambada, openbook_qa, piqa, winogrande
from zoo.evals.core.choices import Item, accuracies, likelihood_requests
from zoo.evals.core.result import Row
from zoo.evals.core.runner import evaluate
from zoo.evals.core.summary import number

QUESTION = {"query": "Q", "choices": ["a", "b"], "gold": 1}
PAIR = {"context_options": ["Ann saw", "Bob saw"], "continuation": "it.", "gold": 0}
PROMPTS: list[tuple[Any, dict[str, Any], list[tuple[str, str]]]] = [
    (piqa, {**QUESTION, "query": "Question: Q\n"}, [("Question: Q\nAnswer:", " a"), ("Question: Q\nAnswer:", " b")]),
    (arc_easy, {**QUESTION, "query": "Question: Q"}, [("Question: Q\nAnswer:", " a"), ("Question: Q\nAnswer:", " b")]),
    (boolq, {**QUESTION, "query": "Passage: P.\nQuestion: q?"}, [("P.\nQuestion: q?\nAnswer:", f" {c}") for c in "ab"]),
    (openbook_qa, QUESTION, [("Q", " a"), ("Q", " b")]),
    (copa, {**QUESTION, "query": "He ran, and fell, because"}, [("He ran, and fell because", f" {c}") for c in "ab"]),
    (winogrande, PAIR, [("Ann saw", " it."), ("Bob saw", " it.")]),
]


@pytest.fixture
def solver(needle_oracle: Any, tokenizer: Any) -> Callable[..., Any]:
    """A model that goes on as a function of the text says."""
    make = type(needle_oracle())
    return lambda answer, every=True: make(tokenizer, answer, every=every)


def _write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("task", "row", "pairs"), PROMPTS, ids=lambda value: getattr(value, "FILE", ""))
def test_prompts(task: Any, row: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    item = task.item(row)
    assert list(item.pairs) == pairs and item.gold == row["gold"]


def test_white_space_goes_to_the_continuation_and_an_empty_context_is_a_token(tokenizer: Any) -> None:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    spaced, plain, empty = likelihood_requests(tokenizer, [("ab \n", "c"), ("ab", " c"), ("", "c")], "piqa")
    bos = tokenizer("a")["input_ids"][:-1]
    assert (spaced.ids, spaced.start) == (bos + ids("ab \nc"), len(bos) + 2)
    assert (plain.ids, plain.start) == (bos + ids("ab c"), len(bos) + 2)
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert (empty.ids, empty.start) == ([prefix, *ids("c")], 1)
    with pytest.raises(ZooError, match="no tokens of its own"):
        likelihood_requests(tokenizer, [("ab", "")], "piqa")


def test_accuracies_divide_by_characters_and_bytes() -> None:
    # per choice -6, -5, -5.5; per character -2, -2.5, -1.1; per byte -1, -2.5, -1.1
    item = Item([], ["ééé", "ab", "abcde"], 0)
    metrics = ("acc", "acc_norm", "acc_bytes")
    found = {gold: accuracies(Item([], item.choices, gold), [-6.0, -5.0, -5.5], metrics) for gold in range(3)}
    assert [tuple(found[gold].values()) for gold in range(3)] == [(0, 0, 1), (1, 0, 0), (0, 1, 0)]
    assert accuracies(Item([], ["a", "b"], 0), [-1.0, -1.0], ("acc",))["acc"]  # the first of equals


def test_accuracies_are_not_shown_as_sizes() -> None:
    assert number(Row("acc_bytes", 0.44)) == "0.44" and number(Row("peak_bytes", 2048)) == "2 KB"


def _log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """ln P(continuation | context), one token at a time, each after everything before it."""
    ids = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    total, greedy = 0.0, True
    for t in range(start, len(ids)):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids[:t]]), use_cache=False).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[ids[t]])
        greedy &= int(logits.argmax()) == ids[t]
    return total, greedy


def test_scores_are_those_of_the_formulas(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    texts = ["cold soup", "é", "stir", "a pan of hot water", "no"]
    rows = [{"query": f"Question: {t}?\n", "choices": [texts[i - 1], texts[i - 2]], "gold": i % 2}
            for i, t in enumerate(texts)]  # fmt: skip
    result = piqa.evaluate(llama, tokenizer, examples=_write(tmp_path / "any.jsonl", rows))
    hits = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    for row in rows:
        lls = [_log_likelihood(llama, tokenizer, f"{row['query']}Answer:", f" {c}")[0] for c in row["choices"]]
        for metric, size in (("acc", lambda c: 1), ("acc_norm", len), ("acc_bytes", lambda c: len(c.encode()))):
            first, second = (ll / size(choice) for ll, choice in zip(lls, row["choices"], strict=True))
            hits[metric] += (0 if first >= second else 1) == row["gold"]
    assert {row.metric: row.value * 5 for row in result.rows} == hits and all(row.n == 5 for row in result.rows)


def test_lambada_is_the_likelihood_of_the_word(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    contexts = ["he saw the", "under the", "a cold wind and a"]
    with torch.inference_mode():  # the first passage ends in the model's own choice
        start = tokenizer(contexts[0] + " ", return_tensors="pt")["input_ids"]
        best = tokenizer.decode(llama(input_ids=start).logits[0, -1].argmax())
    rows = [{"context": c, "continuation": w} for c, w in zip(contexts, [best, "sea", "hat"], strict=True)]
    result = lambada.evaluate(llama, tokenizer, examples=_write(tmp_path / "lambada_openai.jsonl", rows).parent)
    found = [_log_likelihood(llama, tokenizer, row["context"], f" {row['continuation']}") for row in rows]
    assert result.value("perplexity") == pytest.approx(math.exp(-sum(ll for ll, _ in found) / 3), rel=1e-5)
    assert [record.scores["acc"] for record in result.records] == [greedy for _, greedy in found]
    assert result.row("perplexity").n == 3 and result.comparable_to == "lm_eval:lambada_openai"


@pytest.mark.parametrize("wrong", [False, True])
def test_a_solver_is_always_right(solver: Callable[..., Any], tokenizer: Any, tmp_path: Path, wrong: bool) -> None:
    rows = [
        {"query": f"Question: {i}\n", "choices": [f"{i * 7:02}.", f"{i * 3:02}!"], "gold": i % 2} for i in range(1, 9)
    ]
    texts = [f"{row['query']}Answer: {row['choices'][row['gold'] ^ wrong]}" for row in rows]
    model = solver(lambda text: next((whole[len(text) :] for whole in texts if whole.startswith(text)), ""))
    result = piqa.evaluate(model, tokenizer, examples=_write(tmp_path / "piqa.jsonl", rows))
    assert {row.value for row in result.rows} == {0.0 if wrong else 1.0}


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 3 + 4 = 7\n#### 7", True, True),
        (" so it is 7.", False, True),
        ("#### 7\n#### 8", True, False),
        (" #### $7", False, True),
        ("#### 7.", True, True),
        (" 1,234 and 7,", False, True),
        ("#### -7", False, False),
        ("####7", False, True),
        ("", False, False),
    ],
)
def test_gsm8k_reads_numbers(text: str, strict: bool, flexible: bool) -> None:
    assert gsm8k.scores(text, "7") == {"strict": strict, "flexible": flexible}
    assert gsm8k.scores("#### 1,234", "1234") == {"strict": True, "flexible": True}


def test_gsm8k_shots(solver: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    problems = [
        {"context": f"What is {i}+{i}?", "chain_of_thought": f"{i}+{i}", "answer": str(2 * i)} for i in range(9)
    ]
    one = gsm8k.prompt(problems[4], 4, 1, problems[3:5], 0)
    assert one == "Question: What is 3+3?\nAnswer: 3+3\n#### 6\n\nQuestion: What is 4+4?\nAnswer:"
    for seed in range(10):
        text = gsm8k.prompt(problems[4], 4, 3, problems, seed)
        assert text.count("Question:") == 4 and text.count("What is 4+4?") == 1

    def answer(text: str) -> str:
        asked = int(text.rpartition("What is ")[2].split("+")[0])
        return f" so\n#### {2 * asked if asked < 3 else 99}\n\nQuestion: 5"

    examples = _write(tmp_path / "gsm8k.jsonl", problems).parent
    options: dict[str, Any] = {"shots": 2, "max_new": 30}
    result = gsm8k.evaluate(solver(answer, every=False), tokenizer, examples=examples, **options)
    assert result.value("strict") == result.value("flexible") == 3 / 9
    fewer = gsm8k.evaluate(solver(answer, every=False), tokenizer, examples=examples, samples=2, **options)
    assert [r.prompt for r in fewer.records] == [r.prompt for r in result.records[:2]]
    assert result.records[0].output == " so\n#### 0\n\n"
    with pytest.raises(ZooError, match="shots was 9; it must be from 0 to 8"):
        gsm8k.evaluate(solver(answer), tokenizer, examples=examples, shots=9)


def test_long_examples_are_left_out_and_counted(make_llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"context": "a" * size, "continuation": "b"} for size in (20, 200, 30)]
    examples = _write(tmp_path / "long.jsonl", rows)
    model = make_llama(max_position_embeddings=64)
    result = lambada.evaluate(model, tokenizer, examples=examples)
    assert (result.skipped, [record.id for record in result.records]) == (1, ["0", "2"])
    problems = [{"context": "a" * 90, "chain_of_thought": "", "answer": "1"}]
    for task, path in (
        (lambada, _write(tmp_path / "l.jsonl", rows[1:2])),
        (gsm8k, _write(tmp_path / "g.jsonl", problems)),
    ):
        with pytest.raises(ZooError, match="64 positions"):
            task.evaluate(model, tokenizer, examples=path, **({"shots": 0} if task is gsm8k else {}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "piqa.jsonl:1 is not JSON"),
        ('{"query": "a"}\n', "has no choices, gold"),
        ("[1]\n", "has no query, choices, gold"),
        ('\n{"query": "a", "choices": ["b"], "gold": 1}\n', "piqa.jsonl:2 has gold 1; it must be from 0 to 0"),
    ],
)
def test_unusable_examples_are_refused_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "piqa.jsonl").write_text(text)
    with pytest.raises(ZooError, match=message):
        evaluate("no-such-model", tasks=["piqa"], examples=tmp_path)


def test_missing_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="needs examples and none were given"):
        evaluate("no-such-model", tasks=["arc_easy"])
    with pytest.raises(ZooError, match="boolq.jsonl' does not exist"):
        evaluate("no-such-model", tasks=["boolq"], examples=tmp_path)


@pytest.mark.shared
def test_every_bundled_file_is_read(shared: Path) -> None:
    counts = {piqa: 1838, arc_easy: 2376, boolq: 3270, openbook_qa: 500, copa: 100, winogrande: 1267, lambada: 5153}
    for task, count in {**counts, gsm8k: 1319}.items():
        assert len(task.read(shared / "corpora" / "tasks")) == count
