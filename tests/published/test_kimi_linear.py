"""Kimi Linear: transformers' logits, for fields as the hub and as transformers' code name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_published

import zoo
from zoo.architectures import kimi_linear

HUB: dict[str, Any] = dict(
    model_type="kimi_linear",
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    linear_attn_config=dict(
        full_attn_layers=[2, 4], kda_layers=[1, 3], num_heads=4, head_dim=8, short_conv_kernel_size=4
    ),
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=None,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=10,
    mla_use_nope=True,
    first_k_dense_replace=1,
    num_experts=5,
    num_experts_per_token=2,
    moe_intermediate_size=20,
    num_shared_experts=1,
    moe_renormalize=True,
    num_expert_group=1,
    topk_group=1,
    routed_scaling_factor=2.446,
    model_max_length=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CODE: dict[str, Any] = dict(
    model_type="kimi_linear",
    vocab_size=97,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=3,
    layer_types=["full_attention", "linear_attention", "full_attention"],
    mlp_layer_types=["sparse", "sparse", "dense"],
    num_attention_heads=3,
    num_key_value_heads=3,
    attention_bias=True,
    q_lora_rank=14,
    kv_lora_rank=20,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    linear_num_heads=3,
    linear_head_dim=10,
    linear_conv_kernel_dim=3,
    num_local_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_shared_experts=2,
    norm_topk_prob=False,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=1.5,
    rms_norm_eps=1e-4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.mark.parametrize("config", [HUB, CODE], ids=["hub", "code"])
def test_kimi_linear(config: dict[str, Any], tmp_path: Path) -> None:
    decoder = assert_published(config, tmp_path, tokens=100).config.decoder_config
    mixers, channels = ([getattr(layer, kind) for layer in decoder.layers] for kind in ("mixer", "channel"))
    if config is HUB:
        assert mixers == ["kimi_delta", "mla", "kimi_delta", "mla"] and channels == ["swiglu", "moe", "moe", "moe"]
        assert decoder.layers[1].mixer_args["q_rank"] is None
    else:
        assert mixers == ["mla", "kimi_delta", "mla"] and channels == ["moe", "moe", "swiglu"]
        assert decoder.layers[0].mixer_args["q_rank"] == 14 and decoder.layers[0].channel_args["shared_size"] == 32
    assert not decoder.ropes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("mla_use_nope", False),
        ("moe_router_activation_func", "softmax"),
        ("moe_layer_freq", 2),
        ("num_nextn_predict_layers", 1),
        ("num_key_value_heads", 2),
        ("tie_word_embeddings", True),
        ("layer_types", ["full_attention"] * 3),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(zoo.ZooError, match=field):
        kimi_linear.decoder({**HUB, field: value})
