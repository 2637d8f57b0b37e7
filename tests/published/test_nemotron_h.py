"""Nemotron-H: transformers' logits for patterns of all four kinds of layer, and the layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

from zoo.architectures import nemotron_h
from zoo.errors import ZooError

CONFIGS: dict[str, dict[str, Any]] = {
    "dense": dict(
        model_type="nemotron_h",
        vocab_size=101,
        hidden_size=32,
        hybrid_override_pattern="M-M*-",
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        mamba_num_heads=6,
        mamba_head_dim=8,
        ssm_state_size=12,
        n_groups=3,
        chunk_size=16,
        use_bias=True,
        mlp_bias=True,
        time_step_min=0.2,
        layer_norm_epsilon=1e-4,
    ),
    "experts": dict(
        model_type="nemotron_h",
        vocab_size=97,
        hidden_size=40,
        layers_block_type=["moe", "full_attention", "linear_attention", "mlp", "moe"],
        intermediate_size=56,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=20,
        ssm_state_size=7,
        n_groups=2,
        conv_kernel=3,
        use_conv_bias=False,
        chunk_size=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=36,
        moe_latent_size=20,
        routed_scaling_factor=2.5,
    ),
}


@pytest.mark.parametrize(("name", "pattern"), [("dense", "M-M*-"), ("experts", "E*M-E")])
def test_nemotron_h(name: str, pattern: str, tmp_path: Path) -> None:
    decoder = assert_published(CONFIGS[name], tmp_path).config.decoder_config
    parts = {"M": ("mamba2", None), "*": ("attention", None), "-": (None, "relu2"), "E": (None, "moe")}
    assert [(layer.mixer, layer.channel) for layer in decoder.layers] == [parts[letter] for letter in pattern]
    assert all(layer.mixer_args.get("rope") is None for layer in decoder.layers)


@pytest.mark.parametrize(
    ("size", "layers", "counts"), [("8b", 52, (24, 24, 4)), ("47b", 98, (45, 48, 5)), ("56b", 118, (54, 54, 10))]
)
def test_published_patterns(size: str, layers: int, counts: tuple[int, int, int]) -> None:
    pattern = nemotron_h.PRESETS[size]["pattern"]
    assert len(pattern) == layers
    assert tuple(pattern.count(letter) for letter in "M-*") == counts


@pytest.mark.parametrize(
    ("field", "value"), [("time_step_limit", [0.0, 1.0]), ("tie_word_embeddings", True), ("mlp_hidden_act", "silu")]
)
def test_what_it_does_not_compute_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ZooError, match=field):
        nemotron_h.decoder({**CONFIGS["dense"], field: value})
