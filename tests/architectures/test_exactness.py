"""Outside truth: transformers' own classes with the same random weights give the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from zoo_models import draw, feed, forward, same, stir, swiglu_layer

from zoo.architectures.core.config import DecoderConfig, Head, Norm, Rope
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.zoo_config import ZooConfig

NAMES = (
    ("self_attn", "mixer"),
    ("mlp", "channel"),
    ("input_layernorm", "mixer_norm"),
    ("post_attention_layernorm", "channel_norm"),
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
SIZES: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)


def ours(decoder: DecoderConfig, state: dict[str, Tensor], attention: str) -> ZooForCausalLM:
    config = ZooConfig.from_decoder(decoder, "test")
    model = ZooForCausalLM._from_config(config, attn_implementation=attention).eval()
    model.load_state_dict(state, strict=True)
    return model


def softmax_state(reference: PreTrainedModel) -> dict[str, Tensor]:
    state = {}
    for name, value in reference.state_dict().items():
        for theirs, mine in NAMES:
            name = name.replace(f".{theirs}.", f".{mine}.")
        state[name] = value
    return state


def softmax_decoder(args: dict[str, Any], rope: Rope) -> DecoderConfig:
    mixer = dict(heads=4, kv_heads=2, head_dim=24, rope="default", **args)
    return DecoderConfig(
        vocab_size=97,
        hidden_size=64,
        layers=(swiglu_layer("attention", mixer),) * 2,
        ropes={"default": rope},
        norm=Norm(eps=1e-5),
        head=Head(tied=False),
        max_position_embeddings=256,
    )


def compare(reference: PreTrainedModel, model: ZooForCausalLM, tokens: int = 80) -> None:
    ids = draw(2, tokens)
    with torch.no_grad():
        expected = reference(ids, use_cache=False).logits
    found = forward(model, ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.std()
    same(feed(model, ids, (tokens - 3, 1, 2))[0], expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama(attention: str) -> None:
    scaling = dict(LLAMA3)
    config = LlamaConfig(**SIZES, attention_bias=True, rope_parameters={**scaling, "rope_theta": 500.0})
    config._attn_implementation = attention
    torch.manual_seed(0)
    reference = LlamaForCausalLM(config).eval()
    stir(reference, std=0.1)
    biases = dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias"), True)
    decoder = softmax_decoder(biases, Rope(dim=24, theta=500.0, scaling=LLAMA3))
    model = ours(decoder, softmax_state(reference), attention)
    compare(reference, model)
    ids = draw(2, 9)
    with torch.no_grad():
        theirs, mine = (m(ids, output_hidden_states=True).hidden_states for m in (reference, model))
    assert len(theirs) == len(mine)
    for a, b in zip(mine, theirs, strict=True):
        same(a, b)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_qwen3_with_qk_norm(attention: str) -> None:
    config = Qwen3Config(**SIZES, attention_bias=False, rope_parameters={"rope_type": "default", "rope_theta": 1000.0})
    config._attn_implementation = attention
    torch.manual_seed(0)
    reference = Qwen3ForCausalLM(config).eval()
    stir(reference, std=0.1)
    decoder = softmax_decoder(dict(qk_norm="rms", qk_norm_eps=1e-5), Rope(dim=24, theta=1000.0))
    compare(reference, ours(decoder, softmax_state(reference), attention))
