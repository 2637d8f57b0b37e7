"""Small random Llamas with everything that conversion gets wrong elsewhere: GQA, biases, head_dim of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # targets, which pytest's importlib mode does not find by itself

MakeLlama = Callable[..., Path]
HARD = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    attention_bias=True,
    mlp_bias=True,
    max_position_embeddings=128,
)


def word_tokenizer() -> Any:
    """Few words, so that a vocabulary of 96 holds them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<unk>", "<s>", "the", "river", "old", "man", "by", "inn"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def save_llama(folder: Path, max_shard_size: str = "5GB", **values: Any) -> Path:
    """A Llama checkpoint with every parameter random: no bias is zero, no norm is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**HARD, **values}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.2 + shift)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_llama(tmp_path: Path) -> MakeLlama:
    """`make_llama(**config)` writes a checkpoint and returns its directory."""
    counter = iter(range(1000))
    return lambda **values: save_llama(tmp_path / f"llama{next(counter)}", **values)


@pytest.fixture(scope="session")
def hard_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of `HARD`, sharded; tests only read it."""
    return save_llama(tmp_path_factory.mktemp("llama") / "hard", max_shard_size="40KB")


@pytest.fixture(scope="session")
def normed_attention(tmp_path_factory: pytest.TempPathFactory, hard_llama: Path) -> Path:
    """A zoo checkpoint of attention with qk-norm, GQA and head_dim != hidden / heads."""
    from dataclasses import replace

    from zoo.architectures.core.formats import read
    from zoo.architectures.core.load import save
    from zoo.architectures.core.modeling import ZooForCausalLM
    from zoo.architectures.core.zoo_config import ZooConfig

    decoder = read(hard_llama).decoder
    layers = tuple(replace(layer, mixer_args={**layer.mixer_args, "qk_norm": "rms"}) for layer in decoder.layers)
    torch.manual_seed(0)
    model = ZooForCausalLM(ZooConfig.from_decoder(replace(decoder, layers=layers), "transformer"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    return save(model, tmp_path_factory.mktemp("zoo") / "normed", tokenizer=word_tokenizer())
