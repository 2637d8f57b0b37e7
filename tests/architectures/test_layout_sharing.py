"""Layouts of the decoders that share keys, values and memories: which layer is what, and who owns a cache."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from zoo_models import draw, feed, make

import zoo
from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.errors import ZooError


def decoder(name: str, preset: str, **overrides: Any) -> DecoderConfig:
    return zoo.config(name, preset=preset, **overrides).decoder_config


def letter(layer: Layer) -> str:
    """M Mamba, W window, F full attention, G memory unit, X cross attention, R retention."""
    if layer.mixer == "attention":
        return "W" if layer.mixer_args.get("window") else "F"
    return {"mamba": "M", "gmu": "G", "cross": "X", "gated_retention": "R"}[str(layer.mixer)]


def letters(config: DecoderConfig) -> str:
    return "".join(letter(layer) for layer in config.layers)


def kept(case: str) -> list[set[str]]:
    """Names of the states of every layer's cache."""
    _, cache = feed(make(case), draw(1, 9), [8, 1])
    return [set(layer._states) for layer in cache.layers]


def test_phi4_mini_flash_is_sambay() -> None:
    config = decoder("phi4_mini_flash", "mini")
    assert letters(config) == "MW" * 8 + "MF" + "GX" * 7
    assert Counter(letters(config)) == {"M": 9, "W": 8, "F": 1, "G": 7, "X": 7}
    args = [dict(layer.mixer_args) for layer in config.layers]
    assert [i for i, a in enumerate(args) if a.get("writes") == "memory"] == [16]
    assert [i for i, a in enumerate(args) if a.get("writes") == "kv"] == [17]
    assert {a["window"] for a, kind in zip(args, letters(config), strict=True) if kind == "W"} == {512}
    assert all(a.get("rope") is None for a in args) and not config.ropes and not config.embed.learned_positions
    attentions = [a for a in args if "heads" in a]
    assert {(a["heads"], a["kv_heads"], a["head_dim"]) for a in attentions} == {(40, 20, 64)}
    starts = [a["differential"] for a in attentions]
    assert starts == sorted(starts) and starts[0] == pytest.approx(0.8 - 0.6 * 0.7408182)  # of layer 1
    assert {a["inner"] for a in args if "inner" in a} == {5120}
    assert config.norm.kind == "layer" and config.norm.bias and config.head.tied


def test_the_second_half_of_phi4_mini_flash_owns_no_cache() -> None:
    ssm, ring = {"conv_x", "state"}, {"k", "v", "positions"}
    assert kept("phi4_mini_flash/tiny") == [ssm, ring, ssm, ring, ssm, {"k", "v"}, set(), set()]


def test_yoco_caches_once() -> None:
    config = decoder("yoco", "3b")
    assert letters(config) == "R" * 13 + "F" + "X" * 12
    assert {a for layer in config.layers[13:] for a in (layer.mixer_args["kv_heads"],)} == {8}
    assert letters(decoder("yoco", "3b", window=1024)) == "W" * 13 + "F" + "X" * 12
    assert all(layer.mixer_args["rope"] for layer in config.layers)
    assert kept("yoco/tiny") == [{"state"}, {"state"}, {"k", "v"}, set()]
    model = make("yoco/tiny")
    grown = model.state_bytes(2000) - model.state_bytes(1000)
    assert grown == 1000 * 2 * 2 * 16 * 4  # keys and values of two KV heads of 16 channels, once, in fp32


def test_character_ai_shares_among_neighbours_and_across_blocks() -> None:
    config = decoder("character_ai", "1b")
    assert letters(config) == "WXXWXF" + "WXXWXX" + "WXXWXF" + "WXXWXX"
    args = [layer.mixer_args for layer in config.layers]
    local = [a for i, a in enumerate(args) if i % 6 != 5]
    assert {a["window"] for a in local} == {1024} and {a["kv_heads"] for a in args} == {1}
    assert not any(a.get("window") for i, a in enumerate(args) if i % 6 == 5)
    assert args[11]["kv"] == args[5]["writes"] and args[23]["kv"] == args[17]["writes"] != args[5]["writes"]
    assert [a.get("writes") or a["kv"] for a in args[:5]] == ["local0_0"] * 3 + ["local0_1"] * 2
    assert len({a["writes"] for a in args if a.get("writes")}) == sum(1 for a in args if a.get("writes"))
    ring = {"k", "v", "positions"}
    assert kept("character_ai/tiny") == [ring, set(), {"k", "v"}, ring, set(), set()]


def test_gpt3_alternates_dense_and_banded_layers() -> None:
    config = decoder("gpt3", "175b")
    assert letters(config) == "FW" * 48
    assert config.embed.learned_positions == 2048 and config.norm.kind == "layer" and config.head.tied


def test_the_sparse_transformer_merges_or_takes_turns() -> None:
    parts = [layer.mixer_args["part"] for layer in decoder("sparse_transformer", "enwik8").layers]
    assert parts == ["both"] * 30
    strided = decoder("sparse_transformer", "tiny_strided", depth=4).layers
    assert [layer.mixer_args["part"] for layer in strided] == ["local", "column"] * 2
    assert {layer.mixer for layer in strided} == {"strided"}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("yoco", dict(depth=5), "depth was 5"),
        ("phi4_mini_flash", dict(depth=6), "depth was 6"),
        ("character_ai", dict(global_every=0), "global_every was 0"),
        ("sparse_transformer", dict(pattern="random"), "pattern was 'random'"),
        ("linformer", dict(sharing="all"), "sharing was 'all'"),
    ],
)
def test_a_bad_layout_is_refused(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        zoo.config(name, **overrides)
