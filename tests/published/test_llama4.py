"""Llama 4 against transformers' own classes: the language model alone, and inside the multimodal one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_near, assert_published, ids_of, left_padded, logits, make_reference, step_by_step
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Llama4ForCausalLM, Llama4ForConditionalGeneration

import zoo
from zoo.architectures import llama4
from zoo.errors import ZooError

SMALL: dict[str, Any] = dict(
    model_type="llama4_text",
    vocab_size=101,
    hidden_size=48,
    intermediate_size=40,
    intermediate_size_mlp=56,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    attention_chunk_size=32,
    floor_scale=16,
    attn_scale=0.7,
    num_local_experts=4,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
)
OTHER: dict[str, Any] = dict(
    SMALL,
    num_key_value_heads=4,
    head_dim=10,
    num_local_experts=5,
    num_experts_per_tok=2,
    interleave_moe_layer_step=2,
    no_rope_layers=[0, 1, 1, 0],
    layer_types=["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
    attention_chunk_size=21,
    use_qk_norm=False,
    attention_bias=True,
    attn_temperature_tuning=False,
    rms_norm_eps=1e-3,
    tie_word_embeddings=True,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)
VISION = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    vision_output_dim=16,
    image_size=28,
    projector_input_dim=16,
    projector_output_dim=16,
)


def layers(decoder: Any) -> list[tuple[Any, ...]]:
    """Chunk, rotary table, temperature and channel of each layer."""
    return [(*map(layer.mixer_args.get, ("chunk", "rope", "temperature")), layer.channel) for layer in decoder.layers]


def test_llama4_is_transformers_llama4(tmp_path: Path) -> None:
    ours = assert_published(SMALL, tmp_path)
    decoder = ours.config.decoder_config
    assert layers(decoder) == [(32, "default", None, "moe")] * 3 + [(None, None, (16, 0.7), "moe")]
    assert decoder.ropes["default"].pairing == "interleaved"


def test_other_options(tmp_path: Path) -> None:
    ours = assert_published(OTHER, tmp_path)
    kinds = [(21, None), (None, "default"), (21, "default"), (None, None)]
    channels = ["swiglu", "moe"] * 2
    assert layers(ours.config.decoder_config) == [(*kind, None, c) for kind, c in zip(kinds, channels, strict=True)]


def multimodal(folder: Path, text: dict[str, Any]) -> Llama4ForConditionalGeneration:
    """transformers' multimodal model with the language model `text`, saved to `folder`."""
    config = AutoConfig.for_model("llama4", text_config=text, vision_config=VISION)
    model = Llama4ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.language_model.load_state_dict(make_reference(text).state_dict())
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("newer", [False, True])
def test_the_language_model_of_a_multimodal_checkpoint(tmp_path: Path, newer: bool) -> None:
    text = {**SMALL, "num_hidden_layers": 4, "interleave_moe_layer_step": 2}
    reference = multimodal(tmp_path / "theirs", text)
    if newer:
        file = tmp_path / "theirs" / "model.safetensors"
        save_file({newer_name(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    ours = zoo.from_pretrained(tmp_path / "theirs", attn_implementation="eager")
    ids = ids_of(reference)
    expected = logits(reference, ids)
    assert_near(logits(ours, ids), expected, 2e-5, "one forward")
    assert_near(step_by_step(ours, ids), expected, 2e-5, "prefill and single tokens")
    assert_near(left_padded(ours, ids), expected, 2e-5, "left padding")
    assert ours.config.bos_token_id == 1
    zoo.save(ours, tmp_path / "back", format="published")
    again = Llama4ForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager", dtype=torch.float32)
    assert_near(logits(again, ids), expected, 2e-5, "the language model saved by itself")


def newer_name(name: str) -> str:
    """Names as multimodal models of transformers 5 have them in memory."""
    for old, new in (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return f"model.{name}"


def test_a_tensor_that_no_tower_has_is_refused(tmp_path: Path) -> None:
    multimodal(tmp_path, {**SMALL, "num_hidden_layers": 1})
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "audio_model.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ZooError, match="audio_model.weight"):
        zoo.from_pretrained(tmp_path)


def test_released_sizes() -> None:
    for preset, sparse in (("scout", 48), ("maverick", 24)):
        decoder = llama4.layout(**llama4.PRESETS[preset])
        nope = [index for index, layer in enumerate(decoder.layers) if layer.mixer_args.get("rope") is None]
        assert nope == list(range(3, 48, 4))
        assert {layer.mixer_args.get("chunk") for layer in decoder.layers if layer.mixer_args.get("rope")} == {8192}
        assert sum(layer.channel == "moe" for layer in decoder.layers) == sparse
        assert llama4.decoder(llama4.published(decoder, {})) == decoder


@pytest.mark.parametrize(
    "field", [{"hidden_act": "gelu"}, {"layer_types": ["full"] * 4}, {"attention_chunk_size": None}]
)
def test_what_we_do_not_have_is_refused_by_name(field: dict[str, Any]) -> None:
    with pytest.raises(ZooError, match=next(iter(field))):
        llama4.decoder({**SMALL, **field})
