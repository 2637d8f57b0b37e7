"""Perplexity beyond the training length: pieces against one call, carried against reset state, who may go beyond."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Scripted
from transformers import GPT2Config, GPT2LMHeadModel

import zoo
from zoo.errors import ZooError
from zoo.evals import extrapolation
from zoo.evals.core.runner import evaluate


def ids_of(tokenizer: Any, text: Path, count: int) -> torch.Tensor:
    return torch.tensor(tokenizer(text.read_text())["input_ids"][: count + 1])


def nll(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """By transformers' log-softmax over one call, `[N, L]`."""
    with torch.no_grad():
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.double()
    return -logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]


@pytest.fixture(scope="module")
def recurrent() -> Any:
    model = zoo.create("hybrid", layout="gla*2", depth=2, hidden_size=32, heads=2, vocab_size=258).eval()
    model.config.max_position_embeddings = 32
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform, so that what is carried shows
    return model


def test_pieces_equal_one_call(recurrent: Any, llama: Any, tokenizer: Any, text: Path) -> None:
    rows = ids_of(tokenizer, text, 60)[None].repeat(2, 1)
    rows[1] = rows[1].flip(0)
    for model in (recurrent, llama):
        expected = nll(model, rows)
        for piece in (1, 7, 20, 4096):
            got = extrapolation.stream_nll(model, rows, piece)
            assert got.shape == (2, 60)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_windows_are_read_alone_and_with_the_state_of_those_before(recurrent: Any, tokenizer: Any, text: Path) -> None:
    result = extrapolation.evaluate(
        recurrent, tokenizer, data=text, lengths=[16, 32, 64, 96], beyond=True, windows=2, piece=20
    )
    ids = ids_of(tokenizer, text, 192)
    read = {length: nll(recurrent, ids.unfold(0, length + 1, length)) for length in (16, 32, 64, 96)}
    for length, found in read.items():
        assert result.row("nll", length=length).n == 192 // length
        assert result.value("nll", length=length) == pytest.approx(found.mean().item(), rel=1e-4)
        assert result.value("perplexity", length=length) == pytest.approx(math.exp(found.mean().item()), rel=1e-3)
        start, end = length - length // 16, length  # the last of sixteen ranges
        last = result.value("position_perplexity", length=length, position=start, end=end)
        assert last == pytest.approx(math.exp(found[:, start:end].mean().item()), rel=1e-3)
    for start in (0, 32, 64):  # stretches of the 32 positions that the model states
        apart = read[32].view(2, 3, 32)[:, start // 32]
        carried = read[96][:, start : start + 32]
        at = {"position": start, "end": start + 32}
        values = [result.value("window_perplexity", state=state, **at) for state in ("reset", "carried")]
        assert values == pytest.approx([math.exp(apart.mean().item()), math.exp(carried.mean().item())], rel=1e-3)
        assert (abs(values[0] / values[1] - 1) > 0.01) == (start > 0)  # nothing is carried into the first
    assert result.series["state_carried"]["y"] == [
        row.value for row in result.select("window_perplexity", state="carried")
    ]


def test_lengths_beyond_the_limit_are_asked_for(recurrent: Any, llama: Any, tokenizer: Any, text: Path) -> None:
    arguments: dict[str, Any] = {"tasks": ["extrapolation"], "data": text, "progress": False}
    for model, tokens in ((recurrent, tokenizer), (llama, tokenizer)):
        limit = model.config.max_position_embeddings
        far = [limit // 2, limit + 32]
        with pytest.raises(ZooError, match=f"length {limit + 32} is beyond the model's {limit}"):
            evaluate(model, tokens, **arguments, lengths=far)
        result = evaluate(model, tokens, **arguments, lengths=far, options={"extrapolation": {"beyond": True}})
        assert [row.at["length"] for row in result["extrapolation"].select("nll")] == far
    # another task of the run still refuses, before either has begun
    with pytest.raises(ZooError, match="task 'passkey': length 64 is beyond"):
        evaluate(
            recurrent, tokenizer, tasks=["extrapolation", "passkey"], data=text, progress=False, lengths=[64],
            options={"extrapolation": {"beyond": True}},
        )  # fmt: skip


def test_default_lengths(recurrent: Any, tokenizer: Any, text: Path) -> None:
    for beyond, lengths in ((False, [16, 32]), (True, [16, 32, 64, 128])):
        result = extrapolation.evaluate(recurrent, tokenizer, data=text, beyond=beyond)
        assert result.options["lengths"] == lengths and result.options["tokens"] == lengths[-1]
        states = [row.at["position"] for row in result.select("window_perplexity", state="carried")]
        assert states == ([0, 32, 64, 96] if beyond else [])


def test_learned_positions_end(recurrent: Any, llama: Any, tokenizer: Any, text: Path) -> None:
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    assert extrapolation.learned_positions(model)
    assert not extrapolation.learned_positions(recurrent) and not extrapolation.learned_positions(llama)
    with pytest.raises(ZooError, match="length was 64; the model has learned positions for 32"):
        extrapolation.evaluate(model, tokenizer, data=text, lengths=[64], beyond=True)
    assert extrapolation.evaluate(model, tokenizer, data=text, beyond=True).options["lengths"] == [16, 32]


def test_bad_options_are_one_line(llama: Any, tokenizer: Any, text: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Short.")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lengths": [0], "beyond": True}, "length was 0; it must be a positive number"),
        ({"lengths": []}, r"lengths was \[\]; give at least one"),
        ({"piece": 0}, "piece was 0; it must be at least 1"),
        ({"windows": 0}, "windows was 0"),
        ({"data": None}, "pass --data"),
        ({"data": tmp_path / "short.txt"}, "data has 6 tokens, one window needs 2049"),
    ]
    for options, message in cases:
        with pytest.raises(ZooError, match=message) as caught:
            extrapolation.evaluate(llama, tokenizer, **{"data": text, **options})
        assert "\n" not in str(caught.value)
    with pytest.raises(ZooError, match="needs a tokenizer"):
        extrapolation.evaluate(llama, None, data=text)
    endless = Scripted(tokenizer, str)
    endless.config.max_position_embeddings = None
    with pytest.raises(ZooError, match="states no length that it was made for; pass lengths"):
        extrapolation.evaluate(endless, tokenizer, data=text)
