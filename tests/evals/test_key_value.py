"""Key-value lists: an oracle reads them all, a short memory only the last pairs."""

from __future__ import annotations

from typing import Any

import pytest

from zoo.errors import ZooError
from zoo.evals import key_value


def test_an_oracle_scores_one_and_a_random_model_zero(pair_oracle: Any, llama: Any, tokenizer: Any) -> None:
    result = key_value.evaluate(pair_oracle(), tokenizer, pairs=[4, 30], samples=6)
    assert [(row.at["pairs"], row.value, row.n) for row in result.rows] == [(4, 1.0, 6), (30, 1.0, 6)]
    assert key_value.evaluate(llama, tokenizer, pairs=[4], samples=6).value("accuracy", pairs=4) == 0.0


def test_a_short_memory_reads_the_pairs_within_it(pair_oracle: Any, tokenizer: Any) -> None:
    window, samples = 400, 30
    got = key_value.evaluate(pair_oracle(window), tokenizer, samples=samples).value("accuracy", pairs=30)
    lists = [key_value.prompt(30, sample, 0) for sample in range(samples)]
    inside = sum(f"{text.rsplit(chr(10), 1)[-1]} {value}" in text[-window:] for text, value in lists)
    assert got == inside / samples
    assert 0.1 < got < 0.9


def test_the_list_holds_the_asked_pair_once_and_distinct_keys() -> None:
    text, value = key_value.prompt(30, 0, 0)
    lines = text.split("\n")
    assert len(lines) == 32 and lines[30] == "" and lines[:30].count(f"{lines[31]} {value}") == 1
    assert len({line.split(":")[0] for line in lines[:30]}) == 30
    assert key_value.prompt(30, 1, 0) != (text, value) != key_value.prompt(30, 0, 1)


def test_the_same_pairs_as_needles(needle_oracle: Any, pair_oracle: Any, tokenizer: Any) -> None:
    arguments: dict[str, Any] = {"pairs": [12], "samples": 5, "form": "needles"}
    assert key_value.evaluate(needle_oracle(), tokenizer, **arguments).value("accuracy") == 1.0
    as_list, as_needles = (key_value.prompt(12, 0, 0, form) for form in ("list", "needles"))
    assert as_list[1] == as_needles[1]
    assert as_needles[0].count("One of the special magic numbers for") == 12
    listed, repeat = as_list[0].split("\n"), key_value.prompt(12, 0, 0, "repeat")
    assert repeat[1] == as_list[1] and repeat[0].split("\n")[1:13] == listed[:12] and repeat[0].endswith(listed[-1])
    with pytest.raises(ZooError, match="form 'table' is unknown; choose one of: list, repeat, needles"):
        key_value.evaluate(pair_oracle(), tokenizer, form="table")


def test_the_batch_changes_nothing(pair_oracle: Any, tokenizer: Any) -> None:
    whole, single = (key_value.evaluate(pair_oracle(300), tokenizer, batch_tokens=size) for size in (None, 1))
    assert whole.rows == single.rows


def test_bad_input_is_one_line(llama: Any, tokenizer: Any) -> None:
    for options, message in (({"pairs": [0]}, "pairs was 0"), ({"pairs": [200]}, "beyond the model's 2048")):
        with pytest.raises(ZooError, match=message):
            key_value.evaluate(llama, tokenizer, **options)
    with pytest.raises(ZooError, match="tokenizer"):
        key_value.evaluate(llama, None)
