"""Gemma 3 against transformers' own classes, the text model and the multimodal one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import (
    assert_near,
    assert_published,
    ids_of,
    left_padded,
    logits,
    make_reference,
    step_by_step,
    tolerance,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zoo
from zoo.architectures import gemma3
from zoo.errors import ZooError

SMALL: dict[str, Any] = dict(
    model_type="gemma3_text",
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=20,
    sliding_window=9,
    max_position_embeddings=256,
)
OTHER: dict[str, Any] = dict(
    SMALL,
    num_hidden_layers=3,
    num_key_value_heads=1,
    head_dim=10,
    hidden_activation="gelu",
    attention_bias=True,
    layer_types=["full_attention", "sliding_attention", "full_attention"],
    sliding_window=33,
    final_logit_softcapping=3.0,
    rms_norm_eps=1e-4,
    tie_word_embeddings=False,
    rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    },
)
MULTIMODAL: dict[str, Any] = dict(
    model_type="gemma3",
    text_config={**SMALL, "num_hidden_layers": 3, "sliding_window_pattern": 2},
    vision_config=dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    ),
    mm_tokens_per_image=4,
    image_token_index=100,
    boi_token_index=98,
    eoi_token_index=99,
)


def windows(decoder: Any) -> list[int | None]:
    return [layer.mixer_args.get("window") for layer in decoder.layers]


def test_gemma3_is_transformers_gemma3(tmp_path: Path) -> None:
    decoder = assert_published(SMALL, tmp_path, tokens=80).config.decoder_config
    assert windows(decoder) == [9, 9, 9, 9, 9, None, 9]
    assert [layer.mixer_args["rope"] for layer in decoder.layers] == ["local"] * 5 + ["global", "local"]
    assert (decoder.ropes["local"].theta, decoder.ropes["global"].theta) == (1e4, 1e6)


def test_other_options(tmp_path: Path) -> None:
    decoder = assert_published(OTHER, tmp_path).config.decoder_config
    assert windows(decoder) == [None, 33, None]
    assert decoder.ropes["global"].scaling["factor"] == 8.0 and not decoder.ropes["local"].scaling


@pytest.mark.parametrize("names", ["newer", "older"])
def test_the_language_model_of_a_multimodal_checkpoint(names: str, tmp_path: Path) -> None:
    """transformers' multimodal class fed with text; what is saved back is a text model."""
    reference = make_reference(MULTIMODAL)
    ids = ids_of(reference, 60).clamp(max=97)  # the others stand for images
    expected = logits(reference, ids)
    reference.save_pretrained(tmp_path / "theirs")
    rename_tensors(tmp_path / "theirs" / "model.safetensors", names)
    ours = zoo.from_pretrained(tmp_path / "theirs", attn_implementation="eager")
    assert windows(ours.config.decoder_config) == [9, None, 9]
    bound = tolerance(reference, ids, expected)
    assert_near(logits(ours, ids), expected, bound, "one forward")
    assert_near(step_by_step(ours, ids, 20), expected, bound, "prefill and single tokens")
    assert_near(left_padded(ours, ids), expected, bound, "left padding")
    zoo.save(ours, tmp_path / "back", format="published")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager", dtype=torch.float32)
    assert type(text).__name__ == "Gemma3ForCausalLM"
    assert_near(logits(text, ids), expected, bound, "saved as published")


def rename_tensors(file: Path, names: str) -> None:
    """The names of the hub's checkpoints (`older`), or those that transformers gives its modules today."""
    tensors = load_file(file)
    assert any("vision_tower" in name for name in tensors)
    inside = "language_model.model." if names == "older" else "model.language_model."
    renamed = {}
    for name, tensor in tensors.items():
        for prefix in ("language_model.model.", "model.language_model."):
            name = inside + name.removeprefix(prefix) if name.startswith(prefix) else name
        renamed[name] = tensor
    save_file(renamed, file, metadata={"format": "pt"})


def test_a_config_of_the_hub_is_the_preset() -> None:
    """gemma-3-4b-it's file leaves out what transformers takes by default."""
    text = dict(
        hidden_size=2560,
        intermediate_size=10240,
        model_type="gemma3_text",
        num_hidden_layers=34,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        sliding_window=1024,
    )
    decoder = gemma3.decoder({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert decoder == gemma3.layout(**gemma3.PRESETS["4b"])


@pytest.mark.parametrize(
    ("preset", "window", "full"),
    [
        ("270m", 512, [5, 11, 17]),
        ("1b", 512, [5, 11, 17, 23]),
        ("4b", 1024, [5, 11, 17, 23, 29]),
        ("12b", 1024, list(range(5, 48, 6))),
        ("27b", 1024, list(range(5, 62, 6))),
    ],
)
def test_published_sizes_have_five_windows_to_one(preset: str, window: int, full: list[int]) -> None:
    decoder = gemma3.layout(**gemma3.PRESETS[preset])
    assert windows(decoder) == [None if index in full else window for index in range(len(decoder.layers))]
    gemma3.published(decoder, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_activation", "silu"),
        ("use_bidirectional_attention", True),
        ("attn_logit_softcapping", 50.0),
        ("sliding_window", None),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ZooError, match=field):
        gemma3.decoder({**SMALL, field: value})
