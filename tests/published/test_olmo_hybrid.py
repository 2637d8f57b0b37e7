"""Olmo Hybrid: transformers' logits with and without positions, and the names of the hub's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import assert_near, assert_published, ids_of, logits, make_reference
from safetensors.torch import load_file, save_file

import zoo
from zoo.architectures import olmo_hybrid

NOPE: dict[str, Any] = dict(
    model_type="olmo_hybrid",
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    rope_parameters={"rope_type": "default", "rope_theta": None},
    pad_token_id=0,
    eos_token_id=1,
)
ROPE: dict[str, Any] = dict(
    model_type="olmo_hybrid",
    vocab_size=97,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=3,
    layer_types=["full_attention", "linear_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    linear_num_key_heads=3,
    linear_num_value_heads=6,
    linear_key_head_dim=7,
    linear_value_head_dim=5,
    linear_conv_kernel_dim=3,
    linear_allow_neg_eigval=False,
    rms_norm_eps=1e-4,
    rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    tie_word_embeddings=True,
    pad_token_id=0,
    eos_token_id=1,
)


@pytest.mark.parametrize("config", [NOPE, ROPE], ids=["nope", "rope"])
def test_olmo_hybrid(config: dict[str, Any], tmp_path: Path) -> None:
    decoder = assert_published(config, tmp_path, tokens=100).config.decoder_config
    attention = [i for i, layer in enumerate(decoder.layers) if layer.mixer == "attention"]
    assert attention == ([3] if config is NOPE else [0, 2])
    blocks = {layer.mixer: layer.block for layer in decoder.layers}
    assert blocks == {"attention": "post_norm", "gated_delta_net": "pre_norm"}
    softmax, linear = decoder.layers[attention[0]].mixer_args, decoder.layers[1].mixer_args
    assert softmax["qk_norm_full"] and softmax["rope"] == (None if config is NOPE else "default")
    assert linear["beta_scale"] == (2.0 if config is NOPE else 1.0) and linear["norm_eps"] == 1e-5
    if config is NOPE:
        assert (linear["heads"], linear["head_dim"], linear["value_dim"]) == (4, 6, 12)


def test_the_names_of_the_hub(tmp_path: Path) -> None:
    """There a softmax layer has a `post_attention_layernorm`, and each convolution its own channels."""
    reference = make_reference(ROPE)
    reference.save_pretrained(tmp_path)
    tensors, state = load_file(tmp_path / "model.safetensors"), reference.state_dict()
    for index in (0, 2):
        tensors.pop(f"model.layers.{index}.feedforward_layer_norm.weight")
        name = f"model.layers.{index}.post_attention_layernorm.weight"
        tensors[name] = state[name].clone()
    parts = state["model.layers.1.linear_attn.conv1d.weight"].split([21, 21, 30])
    for name, part in zip("qkv", parts, strict=True):
        tensors[f"model.layers.1.linear_attn.{name}_conv1d.weight"] = part.clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = ids_of(reference, 40)
    assert_near(logits(zoo.from_pretrained(tmp_path), ids), logits(reference, ids), 1e-4, "names of the hub")


def test_what_we_do_not_compute_is_refused_by_name() -> None:
    with pytest.raises(zoo.ZooError, match="hidden_act"):
        olmo_hybrid.decoder({**NOPE, "hidden_act": "gelu"})
    with pytest.raises(zoo.ZooError, match="layer_types"):
        olmo_hybrid.decoder({**NOPE, "layer_types": ["linear_attention"] * 3})
