"""Layouts of linear attention with kernels, fixed decays and slots, none of which transformers ships."""

from __future__ import annotations

import pytest

from zoo import registry
from zoo.architectures import gla, gsa, performer, retnet, rfa, transnormerllm
from zoo.architectures.core.config import DecoderConfig


def layout(name: str, preset: str) -> DecoderConfig:
    module = registry.load("architectures", name)
    return module.layout(**module.PRESETS[preset])


def widths(decoder: DecoderConfig) -> tuple[int, int, int]:
    """Heads and the channels of all keys and values."""
    (args,) = {tuple(sorted(layer.mixer_args.items())) for layer in decoder.layers}
    sizes = dict(args)
    heads, keys = sizes["heads"], sizes["head_dim"]
    return heads, heads * keys, heads * sizes.get("value_dim", keys)


def test_transnormerllm_turns_by_angles_in_the_first_layer_alone() -> None:
    decoder = layout("transnormerllm", "1b")
    assert decoder.norm.kind == "rms_plain" and decoder.embed.scale == 2048**0.5 and decoder.head.tied
    assert [layer.mixer_args["lrpe"] for layer in decoder.layers] == [True, *[False] * 15]
    assert [layer.mixer_args["layer_index"] for layer in decoder.layers] == list(range(16))
    assert {(layer.mixer, layer.channel) for layer in decoder.layers} == {("lightning", "sglu")}
    args = decoder.layers[3].mixer_args
    assert (args["slopes"], args["depth"], args["gate"]) == ("transnormerllm", 16, "linear")
    assert args["value_activation"] is None and args["norm_weight"] is False
    released = transnormerllm.layout(**transnormerllm.PRESETS["tiny"], slopes="minimax", lrpe_layers=0)
    assert {layer.mixer_args["slopes"] for layer in released.layers} == {"minimax"}
    assert not any(layer.mixer_args["lrpe"] for layer in released.layers)


def test_retnet_has_values_twice_as_wide_as_keys() -> None:
    assert widths(layout("retnet", "1b3")) == (8, 2048, 4096)
    assert widths(layout("retnet", "6b7")) == (16, 4096, 8192)
    assert layout("retnet", "1b3").ropes["default"].dim == 256
    assert {layer.channel for layer in layout("retnet", "6b7").layers} == {"gelu_mlp"}
    center = retnet.layout(**retnet.PRESETS["tiny"], norm_center=True).layers[0].mixer_args
    assert center["norm_center"] is True and center["rope"] == "default"


def test_gla_has_keys_half_as_wide_as_values() -> None:
    assert widths(layout("gla", "1b3")) == (4, 1024, 2048)
    assert widths(layout("gla", "2b7")) == (5, 1280, 2560)
    assert not gla.layout(**gla.PRESETS["tiny"]).ropes  # the decay tells distances


def test_gsa_has_64_slots() -> None:
    assert widths(layout("gsa", "2b7")) == (5, 2560, 2560)
    assert {layer.mixer_args["slots"] for layer in layout("gsa", "2b7").layers} == {64}
    assert {layer.mixer_args["slots"] for layer in gsa.layout(**gsa.PRESETS["tiny"]).layers} == {16}


@pytest.mark.parametrize("module", [performer, rfa], ids=["performer", "rfa"])
def test_every_layer_has_random_features_of_its_own(module: object) -> None:
    decoder = module.layout(**module.PRESETS["tiny"])  # type: ignore[attr-defined]
    assert [layer.mixer_args["seed"] for layer in decoder.layers] == [0, 1]


def test_positions_are_told_by_rope_or_by_a_decay() -> None:
    rotary = {"linear_transformer", "performer", "hedgehog", "abc"}
    for name in (*rotary, "cosformer", "rfa"):
        ropes = {layer.mixer_args.get("rope") for layer in layout(name, "tiny").layers}
        assert ropes == ({"default"} if name in rotary else {None})
    assert {layer.mixer_args["rope"] for layer in layout("rfa", "tiny_plain").layers} == {"default"}
    assert {layer.mixer_args["max_distance"] for layer in layout("cosformer", "340m").layers} == {2048}
