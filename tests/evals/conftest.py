"""A tiny Llama, a byte tokenizer, a text, and models whose answers are known."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))  # report_runs, which pytest's importlib mode does not find by itself

SENTENCE = "the a dark old river ran over stones and under trees while men of the town slept in rooms above it"
WORDS = SENTENCE.split()


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(400)]
    path = tmp_path_factory.mktemp("text") / "river.txt"
    path.write_text(" ".join(sentences), encoding="utf-8")
    return path


def build_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    sizes = dict(vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(seed)
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 2048, **overrides})
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that differences show
    return model.eval()


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    return build_llama


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    return build_llama()


class Scripted(nn.Module):
    """A causal model that continues every row as `answer(text)` says; its cache is the ids that it has seen.

    `window` limits it to the last `window` tokens of what it reads. With `every` it answers after each token of the
    prompt, not only after the last: that is what log-likelihoods and labelled rows need (no cache then).
    """

    def __init__(
        self, tokenizer: Any, answer: Callable[[str], str], window: int | None = None, every: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.answer, self.window, self.every = tokenizer, answer, window, every
        self.config = SimpleNamespace(vocab_size=258, max_position_embeddings=4096, name_or_path="", model_type="fake")
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        self.shapes.append(tuple(input_ids.shape))
        prompt, seen = past_key_values or (input_ids, input_ids[:, :0])
        seen = seen if past_key_values is None else torch.cat([seen, input_ids], 1)
        logits = torch.zeros(*input_ids.shape, 258)
        for row in range(len(prompt)):
            for last in range(input_ids.shape[1]) if self.every else [input_ids.shape[1] - 1]:
                read = prompt[row, : last + 1] if self.every else prompt[row]
                reply = self.reply(read if self.window is None else read[-self.window :])
                logits[row, last, (reply + [10] * 99)[seen.shape[1]]] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=(prompt, seen))

    def reply(self, visible: Tensor) -> list[int]:
        ids: list[int] = self.tokenizer(self.answer(self.tokenizer.decode(visible)))["input_ids"]
        return ids


class TokenSolver(nn.Module):
    """A causal model on token tasks: after each prefix of a row, `solve(prefix, hidden)` is its likeliest next token.

    `window` limits the prefix to its last `window` tokens; `hidden` counts those before it.
    """

    def __init__(self, solve: Callable[[list[int], int], int], vocab_size: int, window: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.solve, self.window = solve, window
        self.config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=4096, name_or_path="")

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for end in range(1, len(ids) + 1):
                hidden = 0 if self.window is None else max(0, end - self.window)
                logits[row, end - 1, self.solve(ids[hidden:end], hidden)] = 1.0
        return SimpleNamespace(logits=logits)


def read_needle(text: str) -> str:
    key = re.findall(r"magic number for (\S+) mentioned", text)[-1]
    found = re.search(rf"magic numbers for {key} is: (\d+)\.", text)
    return f" {found.group(1)}." if found else " 0000000."


def read_pair(text: str) -> str:
    key = text.rsplit("\n", 1)[-1]
    found = re.search(rf"^{key} (\d+)$", text, re.MULTILINE)
    return f" {found.group(1)}" if found else " 0"


@pytest.fixture
def needle_oracle(tokenizer: Any) -> Callable[..., Scripted]:
    return lambda window=None: Scripted(tokenizer, read_needle, window)


@pytest.fixture
def pair_oracle(tokenizer: Any) -> Callable[..., Scripted]:
    return lambda window=None: Scripted(tokenizer, read_pair, window)
