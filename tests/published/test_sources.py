"""The softmax formats that conversion reads: transformers' logits and back, and the layouts that configs give."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_published, logits, make_reference
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import zoo
from zoo import registry
from zoo.errors import ZooError

SIZES: dict[str, Any] = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
OTHER: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=300,
    rms_norm_eps=1e-4,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e5, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}
LONG: dict[str, Any] = dict(
    rope_type="longrope", rope_theta=1000.0, short_factor=[1.0, 1.1, 1.3, 1.4], long_factor=[1.0, 2.0, 4.5, 9.0]
)
FULL, LOCAL = "full_attention", "sliding_attention"
PADDING = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
NEOX = {name: value for name, value in OTHER.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
GPT2 = dict(vocab_size=101, n_embd=48, n_layer=2, n_head=3, n_positions=256)
CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": (dict(SIZES, head_dim=16, attention_bias=True, mlp_bias=True), dict(OTHER, rope_parameters=LLAMA3)),
    "mistral": (
        dict(SIZES, head_dim=16, sliding_window=9),
        dict(OTHER, sliding_window=None, rope_parameters=LINEAR),
    ),
    "ministral": (
        dict(SIZES, head_dim=10, sliding_window=9),
        dict(OTHER, head_dim=10, sliding_window=33, layer_types=[FULL, LOCAL, LOCAL, FULL]),
        dict(OTHER, head_dim=12, sliding_window=9, layer_types=[FULL] * 4),
    ),
    "cwm": (
        dict(SIZES, head_dim=10, sliding_window=9, mlp_bias=True),
        dict(OTHER, head_dim=12, sliding_window=33, layer_types=[FULL, LOCAL, LOCAL, FULL]),
    ),
    "mixtral": (
        dict(SIZES, num_local_experts=5, num_experts_per_tok=3),
        dict(OTHER, head_dim=12, num_local_experts=3, num_experts_per_tok=1, sliding_window=9),
    ),
    "qwen2": (
        dict(SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1),
        dict(OTHER, use_sliding_window=False, sliding_window=9, rope_parameters={**LLAMA3, "rope_theta": 700.0}),
    ),
    "qwen3": (
        dict(SIZES, head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=9, max_window_layers=2),
        dict(OTHER, head_dim=6),
    ),
    "qwen3_moe": (
        dict(SIZES, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24, mlp_only_layers=[2]),
        dict(
            OTHER,
            head_dim=14,
            attention_bias=True,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            norm_topk_prob=True,
            decoder_sparse_step=2,
            use_sliding_window=True,
            sliding_window=9,
        ),
    ),
    "phi3": (
        dict(SIZES, **PADDING, sliding_window=9),
        dict(OTHER, **PADDING, rope_parameters=dict(rope_theta=500.0, partial_rotary_factor=0.6)),
        # the whole text is beyond the length before stretching, and so is a prefill; and neither is
        dict(SIZES, **PADDING, rope_parameters=LONG, original_max_position_embeddings=60),
        dict(SIZES, **PADDING, rope_parameters={**LONG, "attention_factor": 1.3}, original_max_position_embeddings=180),
    ),
    "olmo2": (dict(SIZES), dict(OTHER, num_key_value_heads=1, attention_bias=True, rope_parameters=LLAMA3)),
    "smollm3": (
        dict(SIZES, **PADDING, num_hidden_layers=5),
        dict(
            OTHER,
            **PADDING,
            no_rope_layers=[0, 1, 1, 0, 1],
            attention_bias=True,
            mlp_bias=True,
            use_sliding_window=True,
            sliding_window=9,
        ),
    ),
    "granite": (
        dict(SIZES, embedding_multiplier=12, residual_multiplier=0.22, attention_multiplier=0.3, logits_scaling=3.7),
        dict(OTHER, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR, attention_multiplier=0.0078125),
    ),
    "gpt_neox": (
        dict(SIZES, rope_parameters={"rope_theta": 1000.0, "partial_rotary_factor": 0.5}),
        dict(NEOX, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new", layer_norm_eps=1e-3),
    ),
    "gpt2": (
        dict(GPT2),
        dict(
            GPT2,
            n_layer=3,
            n_inner=72,
            activation_function="gelu",
            scale_attn_by_inverse_layer_idx=True,
            scale_attn_weights=False,
            layer_norm_epsilon=1e-3,
            tie_word_embeddings=False,
        ),
    ),
}
CONFIGS["gpt_neox"][0].pop("num_key_value_heads")
NAMES = sorted(CONFIGS)


def config_of(name: str, index: int = 0, **changes: Any) -> dict[str, Any]:
    return copy.deepcopy({"model_type": name, **CONFIGS[name][index], **changes})  # transformers fills in nested fields


def test_every_source_of_a_plain_transformer_is_here() -> None:
    sources = {name for name in zoo.list("sources") if registry.get("sources", name, "ARCHITECTURE") == "transformer"}
    assert sources == set(NAMES)


@pytest.mark.parametrize(("name", "index"), [(name, i) for name in NAMES for i in range(len(CONFIGS[name]))])
def test_logits_are_those_of_transformers_and_back(name: str, index: int, tmp_path: Path) -> None:
    ours = assert_published(config_of(name, index), tmp_path)
    assert ours.config.source_format == name
    assert ours.config.architecture == "transformer"


def small_and_default(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Configs with sizes alone, and the same ones with every field that transformers fills in."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    small = {key: value for key, value in SIZES.items() if key in sizes} if name != "gpt2" else dict(GPT2)
    small.pop("n_positions", None)
    small["num_hidden_layers" if name != "gpt2" else "n_layer"] = 30  # more than Qwen's layers before the windows
    if name not in ("gpt2", "gpt_neox"):
        small["num_attention_heads"], small["hidden_size"] = 32, 64  # a multiple of the KV heads of every format
    for more in ({}, {"use_sliding_window": True, "sliding_window": 5}):
        yield {"model_type": name, **small, **more}, AutoConfig.for_model(name, **small, **more).to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_a_field_left_out_is_what_transformers_takes(name: str) -> None:
    source = registry.load("sources", name)
    for small, filled in small_and_default(name):
        assert source.decoder(small) == source.decoder(filled)


@pytest.mark.parametrize("name", NAMES)
def test_another_activation_is_refused_by_name(name: str) -> None:
    with pytest.raises(ZooError, match="relu"):
        registry.load("sources", name).decoder(config_of(name, hidden_act="relu", activation_function="relu"))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"gpt2"}))
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
        (dict(rope_parameters=None, rope_scaling={"type": "longrope", "short_factor": [1.0]}), "longrope"),
    ],
)
def test_another_rope_type_is_refused_by_name(name: str, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ZooError, match=word):
        registry.load("sources", name).decoder(config_of(name, **changes))


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        *((name, dict(partial_rotary_factor=0.5), "partial_rotary_factor") for name in ("mistral", "qwen3", "olmo2")),
        ("mistral", dict(layer_types=[LOCAL, FULL, LOCAL]), "layer_types"),
        ("mixtral", dict(layer_types=[LOCAL] * 3), "layer_types"),
        ("qwen2", dict(layer_types=[LOCAL, FULL]), "layer_types"),
        ("qwen2", dict(layer_types=[LOCAL, FULL, "conv"]), "layer_types"),
        ("qwen2", dict(layer_types=[LOCAL] * 3, use_sliding_window=False), "sliding_window"),
        ("ministral", dict(sliding_window=None, layer_types=[LOCAL] * 3), "sliding_window"),
        ("phi3", dict(rope_parameters=LINEAR), "linear"),
        ("phi3", dict(rope_parameters={**LONG, "long_factor": [1.0] * 3}), "long_factor"),
        ("phi3", dict(rope_parameters=None, rope_scaling={"type": "ntk"}), "ntk"),
        ("smollm3", dict(no_rope_layers=[1, 0]), "no_rope_layers"),
        ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
        ("gpt_neox", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        ("gpt_neox", dict(head_dim=12), "head_dim"),
    ],
)
def test_what_one_format_does_not_compute_is_refused_by_name(name: str, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ZooError, match=word):
        registry.load("sources", name).decoder(config_of(name, **changes))


def decoder(name: str, index: int = 0) -> Any:
    return registry.load("sources", name).decoder(config_of(name, index))


def mixer_args(name: str, argument: str, index: int = 0) -> list[Any]:
    return [layer.mixer_args.get(argument) for layer in decoder(name, index).layers]


def test_layouts() -> None:
    assert mixer_args("mistral", "window") == [9] * 3 and mixer_args("mistral", "window", 1) == [None] * 4
    assert mixer_args("ministral", "window", 1) == [None, 33, 33, None]
    assert mixer_args("qwen2", "window") == [None, 9, 9] and mixer_args("qwen2", "window", 1) == [None] * 4
    assert mixer_args("qwen2", "q_bias") == [True] * 3 and mixer_args("qwen2", "o_bias") == [None] * 3
    assert mixer_args("qwen3", "qk_norm") == ["rms"] * 3 and not any(mixer_args("qwen3", "qk_norm_full"))
    assert [layer.channel for layer in decoder("qwen3_moe").layers] == ["moe", "moe", "swiglu"]
    assert [layer.channel for layer in decoder("qwen3_moe", 1).layers] == ["swiglu", "moe", "swiglu", "moe"]
    assert decoder("phi3", 1).ropes["default"].dim == 6
    assert {layer.block for layer in decoder("olmo2").layers} == {"post_norm"}
    assert mixer_args("smollm3", "rope") == ["default", "default", "default", None, "default"]
    assert mixer_args("smollm3", "rope", 1) == [None, "default", "default", None]
    assert mixer_args("smollm3", "window", 1) == [9, None, None, 9]
    assert decoder("gpt_neox").ropes["default"].dim == 4 and decoder("gpt_neox", 1).ropes["default"].dim == 2
    assert [layer.block for layer in decoder("gpt_neox").layers] == ["parallel"] * 3
    assert mixer_args("gpt2", "scale") == [None] * 2 and mixer_args("gpt2", "scale", 1) == [1.0, 0.5, 1 / 3]


def saved_otherwise(name: str, folder: Path, renamed: Any, index: int = 0, **more: torch.Tensor) -> tuple[Any, Any]:
    """transformers' model and ours of its checkpoint, whose tensors were `renamed`, beside `more` tensors."""
    reference = make_reference(config_of(name, index))
    reference.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({renamed(key): value for key, value in tensors.items()} | more, folder / "model.safetensors")
    ids = torch.arange(50)[None]
    return logits(reference, ids), logits(zoo.from_pretrained(folder, attn_implementation="eager"), ids)


def test_the_first_gpt2_checkpoints_have_shorter_names_and_masks(tmp_path: Path) -> None:
    mask = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    theirs, ours = saved_otherwise("gpt2", tmp_path, lambda name: name.removeprefix("transformer."), **mask)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_pythia_checkpoints_have_masks_and_frequencies(tmp_path: Path) -> None:
    prefix = "gpt_neox.layers.0.attention."
    more = {prefix + "bias": torch.ones(1, 1, 8, 8), prefix + "rotary_emb.inv_freq": torch.ones(2)}
    theirs, ours = saved_otherwise("gpt_neox", tmp_path, lambda name: name.replace("embed_out", "lm_head"), **more)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_pythia_configs_name_their_rotation_otherwise() -> None:
    older = config_of("gpt_neox", rotary_pct=0.5, rotary_emb_base=1000)
    older.pop("rope_parameters")
    assert registry.load("sources", "gpt_neox").decoder(older) == decoder("gpt_neox")


def test_granite_leaves_plain_decoders_to_llama(tmp_path: Path) -> None:
    zoo.save(zoo.create("transformer", preset="tiny"), tmp_path / "out", format="published")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_a_decoder_of_another_kind_cannot_be_published(tmp_path: Path) -> None:
    made = {name: decoder(name) for name in NAMES}
    for name, other in (("mixtral", "mistral"), ("qwen3_moe", "qwen3"), ("gpt2", "gpt_neox"), ("gpt_neox", "gpt2")):
        with pytest.raises(ZooError):
            registry.load("sources", name).published(made[other], {})
    for name in NAMES:
        with pytest.raises(ZooError, match="layer 0 is gated_delta_net"):
            registry.load("sources", name).published(zoo.config("gated_delta_net", preset="tiny").decoder_config, {})
