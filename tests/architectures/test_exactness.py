"""Outside truth: transformers' own classes with the same random weights give the same logits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from zoo_models import draw, feed, forward, same, stir, swiglu_layer

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
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


MAMBA2 = {
    "one_group": dict(heads=8, head_dim=16, state_dim=12, groups=1, bias=False, conv=4),
    "groups_and_biases": dict(heads=12, head_dim=8, state_dim=20, groups=3, bias=True, conv=3),
}


def mamba2_models(heads: int, head_dim: int, state_dim: int, groups: int, bias: bool, conv: int) -> tuple[Any, Any]:
    """transformers' Mamba-2 and ours with its weights, the fused projections split."""
    inner, keys = heads * head_dim, groups * state_dim
    config = Mamba2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_heads=heads, head_dim=head_dim, expand=inner // 32,
        state_size=state_dim, n_groups=groups, conv_kernel=conv, use_bias=bias, chunk_size=8, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = Mamba2ForCausalLM(config).eval()
    stir(reference, std=0.1)
    biases = ("z", "x", "B", "C", "dt", "out") if bias else ()
    args = dict(heads=heads, head_dim=head_dim, state_dim=state_dim, groups=groups, conv=conv, biases=biases)
    decoder = DecoderConfig(
        vocab_size=97,
        hidden_size=32,
        layers=(Layer(mixer="mamba2", mixer_args={**args, "norm_eps": config.layer_norm_epsilon}),) * 2,
        norm=Norm(eps=config.layer_norm_epsilon),
        head=Head(tied=False),
    )
    state: dict[str, Tensor] = {}
    for name, value in reference.state_dict().items():
        state |= split_mamba2(renamed_mamba2(name), value, inner, keys)
    return reference, ours(decoder, state, "eager")


def renamed_mamba2(name: str) -> str:
    for pattern, mine in (
        ("backbone.embeddings", "model.embed_tokens"),
        ("backbone.norm_f", "model.norm"),
        ("backbone", "model"),
        (r"(layers\.\d+)\.norm\.", r"\1.mixer_norm."),
        (r"mixer\.norm\.weight", "mixer.norm_weight"),
    ):
        name = re.sub(pattern, mine, name)
    return name


def split_mamba2(name: str, value: Tensor, inner: int, keys: int) -> dict[str, Tensor]:
    if ".in_proj." in name:
        widths = (inner, inner, keys, keys, value.shape[0] - 2 * inner - 2 * keys)
        pieces = zip(("z", "x", "B", "C", "dt"), value.split(widths), strict=True)
        return {name.replace("in_proj", f"{piece}_proj"): part for piece, part in pieces}
    if ".conv1d." in name:
        suffix = "_bias" if name.endswith("bias") else ""
        base, parts = name.partition("conv1d")[0], value.split((inner, keys, keys))
        return {
            f"{base}convs.{n}{suffix}": part.reshape(len(part), *part.shape[2:])
            for n, part in zip("xBC", parts, strict=True)
        }
    return {name: value}


@pytest.mark.parametrize("sizes", MAMBA2.values(), ids=MAMBA2)
def test_mamba2(sizes: dict[str, Any]) -> None:
    reference, model = mamba2_models(**sizes)
    ids = draw(2, 21)
    with torch.no_grad():
        whole = reference(ids, use_cache=False).logits
        cache = DynamicCache(config=reference.config)
        pieces = [reference(part, cache_params=cache, use_cache=True).logits for part in ids.split((13, *[1] * 8), 1)]
    same(forward(model, ids), whole)
    same(feed(model, ids, (13, *[1] * 8))[0], torch.cat(pieces, 1))
