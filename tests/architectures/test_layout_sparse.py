"""Layouts of the decoders with trained sparse attention: which layer is what, and the published numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from zoo_models import draw, forward, make, same

import zoo
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.rope import RotaryTable
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.architectures.minicpm4 import FACTORS


def decoder(name: str, preset: str, **overrides: Any) -> DecoderConfig:
    return zoo.config(name, preset=preset, **overrides).decoder_config


def mixer(name: str, config: DecoderConfig) -> Any:
    (found,) = {cls.parse(layer.mixer_args) for layer in config.layers if layer.mixer == name
                for cls in [zoo.registry.get("mixers", name, "MODULE")]}  # fmt: skip
    return found


def test_minicpm4_is_infllm_v2_throughout() -> None:
    config = decoder("minicpm4", "8b")
    assert Counter(layer.mixer for layer in config.layers) == {"infllm_v2": 32}
    args = mixer("infllm_v2", config)
    assert (args.heads, args.kv_heads, args.head_dim, args.rope) == (32, 2, 128, "default")
    assert (args.kernel, args.stride, args.init, args.block, args.window) == (32, 16, 1, 64, 2048)
    assert args.dense_len == 8192 and args.budget == 64 * 64 + 2048
    assert config.embed.scale == 12 and config.head.scale == 1 / 16
    assert [layer.block_args["residual_scale"] for layer in config.layers] == pytest.approx([1.4 / 32**0.5] * 32)
    assert config.norm.eps == 1e-6 and config.max_position_embeddings == 32768
    assert {layer.mixer for layer in decoder("minicpm4", "0.5b").layers} == {"infllm_v2"}


def test_minicpm4_turns_by_long_rope() -> None:
    """Frequencies are divided by the published factors, at all positions by the same ones."""
    config = decoder("minicpm4", "8b")
    table, positions = RotaryTable(config.ropes["default"], 32768), torch.tensor([[7, 1000], [7, 40000]])
    speeds = 10000.0 ** (-torch.arange(64).double() / 64) / torch.tensor(FACTORS).double()
    angles = (positions[..., None] * speeds).repeat(1, 1, 2)
    cos, sin = table(positions)
    same(cos[:, :1], angles.cos()[:, :1], 1e-5)
    same(sin[:, :1], angles.sin()[:, :1], 1e-5)
    assert (cos - angles.cos()).abs().max() < 0.02  # angles of far positions are rounded in fp32


def test_minicpm4_is_dense_for_short_texts() -> None:
    config = zoo.config("minicpm4", preset="tiny").to_dict()
    sparse, ids = make("minicpm4/tiny"), draw(1, 100)
    for layer in config["layers"]:
        layer["mixer_args"]["budget"] = 1.0
    dense = ZooForCausalLM(ZooConfig.from_dict(config)).eval()
    dense.load_state_dict(sparse.state_dict())
    assert sparse.config.layers[0]["mixer_args"]["dense_len"] == 16
    found, expected = forward(sparse, ids), forward(dense, ids)
    same(found[:, :48], expected[:, :48])  # 16 tokens by rule, then as long as the budget of 3 blocks has them all
    with pytest.raises(AssertionError):
        same(found[:, 48:], expected[:, 48:])


def test_moba_ends_with_full_attention() -> None:
    config = decoder("moba", "8b_1m")
    assert [layer.mixer for layer in config.layers] == ["moba"] * 29 + ["attention"] * 3
    args = mixer("moba", config)
    assert (args.block, args.budget, args.schedule.fixed) == (4096, 12 * 4096, 12)
    assert [layer.mixer for layer in decoder("moba", "tiny").layers] == ["moba", "moba", "attention"]
    assert {layer.mixer for layer in decoder("moba", "tiny", full_layers=0).layers} == {"moba"}


def test_nsa_is_the_papers_27b() -> None:
    config = decoder("nsa", "27b")
    assert len(config.layers) == 30 and config.hidden_size == 2560
    assert [layer.channel for layer in config.layers] == ["swiglu"] + ["moe"] * 29
    args, experts = mixer("nsa", config), config.layers[1].channel_args
    assert (args.heads, args.kv_heads, args.head_dim, args.value_dim) == (64, 4, 192, 128)
    assert (args.size, args.stride, args.block, args.window) == (32, 16, 64, 512)
    assert args.schedule.fixed == 16 and (args.init, args.local) == (1, 2)
    assert (experts["experts"], experts["top_k"], experts["shared_size"]) == (72, 6, 2 * experts["intermediate_size"])
    with torch.device("meta"):
        model = ZooForCausalLM(zoo.config("nsa", preset="27b"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(27e9, rel=0.05)


def test_nsa_keeps_one_branch_of_all_tokens() -> None:
    """The selected branch holds every token, the compressed one every 16th and the window 512."""
    model = ZooForCausalLM(zoo.config("nsa", preset="tiny", attention=None))
    tokens, pair = 16 * 1000, 2 * (16 + 8) * 4  # two KV heads in fp32
    grown = model.state_bytes(2 * tokens) - model.state_bytes(tokens)
    assert grown == 3 * pair * (tokens + tokens // 16)
