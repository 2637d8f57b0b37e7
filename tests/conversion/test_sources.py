"""Every softmax format is a source of conversion: checked against transformers' class, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from targets import RECURRENT, assert_learns
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import zoo
from zoo import registry
from zoo.errors import ZooError

SIZES: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(num_experts_per_tok=2)
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma2": dict(sliding_window=9, query_pre_attn_scalar=20),
    "gemma3_text": dict(sliding_window=9, query_pre_attn_scalar=20),
    "cohere2": dict(sliding_window=9, head_dim=8),
    "cwm": dict(sliding_window=9, mlp_bias=True),
    "gpt2": dict(vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=128, scale_attn_by_inverse_layer_idx=True),
    "gpt_neox": dict(head_dim=8),
    "granite": dict(attention_multiplier=0.3, residual_multiplier=0.22, embedding_multiplier=12, logits_scaling=3.7),
    "llama": dict(attention_bias=True, mlp_bias=True),
    "ministral": dict(sliding_window=9, layer_types=["full_attention", "sliding_attention"] * 2),
    "mistral": dict(sliding_window=9),
    "mixtral": dict(num_local_experts=3, **EXPERTS),
    "olmo2": {},
    "phi3": dict(rope_parameters=dict(rope_theta=500.0, partial_rotary_factor=0.5)),
    "qwen2": dict(use_sliding_window=True, sliding_window=9, max_window_layers=2),
    "qwen3": dict(attention_bias=True),
    "qwen3_moe": dict(num_experts=3, moe_intermediate_size=24, mlp_only_layers=[2], **EXPERTS),
    "smollm3": dict(attention_bias=True, mlp_bias=True),
}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Make:
    """`make(model_type)` is the directory of a random checkpoint with a tokenizer of bytes, which Qwen2's class, that
    transformers takes for `qwen2` whatever was saved, reads the same."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp("source") / name
        torch.manual_seed(0)
        sizes = SIZES if name != "gpt2" else {}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**sizes, **OPTIONS[name]}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return made


def test_every_source_of_a_plain_transformer_is_here() -> None:
    sources = {name for name in zoo.list("sources") if registry.get("sources", name, "ARCHITECTURE") == "transformer"}
    assert sources <= set(OPTIONS)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_attention_becomes_gated_delta_net(make: Make, tmp_path: Path, name: str) -> None:
    path = make(name)
    plan = zoo.convert(path, tmp_path / "dry", mixer="gated_delta_net", keep=[1], dry_run=True).plan
    assert set(plan.swaps) == {0, 2, 3} and not (tmp_path / "dry").exists()
    report = zoo.convert(path, tmp_path / "out", mixer="gated_delta_net", keep=[1], fresh_process=False)
    assert report.ok
    assert all(report.checks[check]["passed"] for check in ("tensors", "identity", "expansion"))
    model = zoo.from_pretrained(tmp_path / "out")
    assert [layer.mixer == "attention" for layer in model.config.decoder_config.layers] == [False, True, False, False]
    with pytest.raises(ZooError, match="layer 0 is gated_delta_net"):
        zoo.save(model, tmp_path / "published", format="published")
    assert_learns(path, tmp_path / "out", set(report.plan.new), [0, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("mixer", RECURRENT)
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_source_becomes_every_mixer(make: Make, tmp_path: Path, name: str, mixer: str) -> None:
    path = make(name)
    if (name, mixer) == ("olmo2", "head_hybrid"):
        with pytest.raises(ZooError, match="qk_norm_full"):
            zoo.convert(path, tmp_path / "out", mixer=mixer, keep=[1], fresh_process=False)
        return
    report = zoo.convert(path, tmp_path / "out", mixer=mixer, keep=[1], fresh_process=False)
    assert report.checks["identity"]["passed"] and report.checks["expansion"]["passed"]
    assert_learns(path, tmp_path / "out", set(report.plan.new), [0, 2, 3])


def test_a_norm_of_all_heads_leaves_none_to_choose(make: Make, tmp_path: Path) -> None:
    path = make("olmo2")
    with pytest.raises(ZooError, match="layer 2: the source's attention uses qk_norm_full"):
        zoo.convert(path, tmp_path / "out", mixer="gated_delta_net", keep_heads={2: [0]}, dry_run=True)
    report = zoo.convert(path, tmp_path / "out", mixer="attention(window=16)", keep=[1], fresh_process=False)
    assert report.ok and report.checks["window"]["passed"]
