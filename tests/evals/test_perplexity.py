"""Perplexity against a plain loop, transformers' own loss, and the two cases that are known in closed form."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zoo.errors import ZooError
from zoo.evals import perplexity
from zoo.evals.core import running, text


def test_equals_a_plain_loop_over_the_text(llama: Any, tokenizer: Any, text: Path) -> None:
    result = perplexity.evaluate(llama, tokenizer, data=text, length=64, windows=5)
    ids = tokenizer(text.read_text())["input_ids"]
    total = 0.0
    for start in range(0, 5 * 64, 64):
        for t in range(64):
            context = torch.tensor([ids[start : start + t + 1]])
            with torch.no_grad():
                total -= llama(context).logits[0, -1].log_softmax(-1)[ids[start + t + 1]].item()
    assert result.value("nll") == pytest.approx(total / 320, rel=1e-5)
    assert result.value("perplexity") == pytest.approx(math.exp(total / 320), rel=1e-4)
    # one byte per token here
    assert result.value("bits_per_byte") == pytest.approx(total / 320 / math.log(2), rel=1e-5)
    assert result.value("tokens") == 320


def test_equals_transformers_loss(llama: Any, tokenizer: Any, text: Path) -> None:
    result = perplexity.evaluate(llama, tokenizer, data=text, length=128)
    rows = torch.tensor(tokenizer(text.read_text())["input_ids"])
    windows = [rows[i : i + 129][None] for i in range(0, len(rows) - 128, 128)]
    with torch.no_grad():
        losses = [llama(row, labels=row).loss.item() for row in windows]
    assert result.row("nll").n == len(losses)
    assert result.value("nll") == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.skipped == len(rows) - 1 - 128 * len(losses)


def test_positions_average_to_the_whole(llama: Any, tokenizer: Any, text: Path) -> None:
    result = perplexity.evaluate(llama, tokenizer, data=text, length=64, windows=4)
    rows = list(result.select("position_perplexity"))
    assert [row.at["position"] for row in rows] == list(range(0, 64, 4))
    assert sum(math.log(row.value) for row in rows) / len(rows) == pytest.approx(result.value("nll"))


def test_uniform_logits_give_the_vocabulary_size(make_llama: Any, tokenizer: Any, text: Path) -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = perplexity.evaluate(model, tokenizer, data=text, length=64, windows=2)
    assert result.value("perplexity") == pytest.approx(258, rel=1e-5)


def test_batch_size_changes_nothing(llama: Any, monkeypatch: Any, tokenizer: Any, text: Path) -> None:
    whole = perplexity.evaluate(llama, tokenizer, data=text, length=64, windows=7).value("nll")
    monkeypatch.setattr(running, "row_batches", lambda rows, _: rows.split(1))
    assert perplexity.evaluate(llama, tokenizer, data=text, length=64, windows=7).value("nll") == pytest.approx(whole)


def test_chunks_change_nothing(monkeypatch: Any) -> None:
    logits, targets = torch.randn(2, 9, 258), torch.randint(258, (2, 9))
    whole = running.token_nll(logits, targets)
    monkeypatch.setattr(running, "_CHUNK", 258 * 4)
    torch.testing.assert_close(running.token_nll(logits, targets), whole)


def test_low_precision_logits_are_normalised_in_fp32() -> None:
    logits, targets = torch.randn(1, 200, 8192).bfloat16(), torch.randint(8192, (1, 200))
    exact = torch.nn.functional.cross_entropy(logits[0].double(), targets[0], reduction="none")
    assert (running.token_nll(logits, targets)[0] - exact).abs().max() < 1e-4


def test_a_bos_token_is_context_and_every_token_is_scored_once(tokenizer: Any) -> None:
    class WithBos:
        bos_token_id = 256

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [256] * add_special_tokens + list(text.encode())}

        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode()

    cut = text.windows("abcdefgh!", WithBos(), 4)
    assert cut.rows.tolist() == [[256, *b"abcd"], [256, *b"efgh"]]
    assert (cut.n_bytes, cut.skipped) == (8, 1)
    plain = SimpleNamespace(rows=text.windows("abcdefgh!", tokenizer, 4).rows)
    assert [tokenizer.decode(row) for row in plain.rows] == ["abcde", "efgh!"]


def test_training_mode_comes_back(make_llama: Any, tokenizer: Any, text: Path) -> None:
    model = make_llama().train()
    perplexity.evaluate(model, tokenizer, data=text, length=16, windows=1)
    assert model.training


def test_bad_input_is_one_line(llama: Any, tokenizer: Any, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "table.csv").write_text("a,b")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "pass --data"),
        ({"data": tmp_path / "none.txt"}, "does not exist"),
        ({"data": tmp_path / "empty.txt"}, "is empty"),
        ({"data": tmp_path / "bytes.txt"}, "UTF-8"),
        ({"data": tmp_path / "table.csv"}, "'.csv'"),
        ({"data": tmp_path / "short.txt"}, "data has 3 tokens, one window needs 2049"),
        ({"data": text, "length": 4096}, "length 4096 is beyond the model's 2048"),
        ({"data": text, "length": 0}, "positive"),
        ({"data": text, "windows": 0}, "windows was 0"),
    ]
    for options, message in cases:
        with pytest.raises(ZooError, match=message) as caught:
            perplexity.evaluate(llama, tokenizer, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ZooError, match="tokenizer"):
        perplexity.evaluate(llama, None, data=text)


def test_reads_compressed_text(llama: Any, tokenizer: Any, text: Path, tmp_path: Path) -> None:
    import lzma

    packed = tmp_path / "river.txt.xz"
    packed.write_bytes(lzma.compress(text.read_bytes()))
    plain = perplexity.evaluate(llama, tokenizer, data=text, length=64, windows=2)
    assert perplexity.evaluate(llama, tokenizer, data=packed, length=64, windows=2).value("nll") == plain.value("nll")


@pytest.mark.shared
def test_the_known_model_on_the_known_text(shared: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "checkpoints" / "books-llama-22m"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = shared / "corpora" / "books" / "heldout.txt"
    result = perplexity.evaluate(model, tokenizer, data=data, length=2048, windows=1)
    assert result.value("nll") == pytest.approx(3.4388, abs=2e-3)
