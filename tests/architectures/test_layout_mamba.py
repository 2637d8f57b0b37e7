"""Layouts of Mamba models that transformers does not ship."""

from __future__ import annotations

import pytest

from zoo.architectures import samba


def test_samba_alternates_mamba_and_windows() -> None:
    decoder = samba.layout(**samba.PRESETS["1b3"])
    assert [layer.mixer for layer in decoder.layers] == ["mamba", "attention"] * 9
    assert {layer.channel for layer in decoder.layers} == {"swiglu"}
    windows = {layer.mixer_args["window"] for layer in decoder.layers if layer.mixer == "attention"}
    assert windows == {2048}  # no layer sees everything
    assert {layer.mixer_args["rope"] for layer in decoder.layers if layer.mixer == "attention"} == {"default"}
    assert decoder.ropes["default"].dim == 128
    states = {(layer.mixer_args["inner"], layer.mixer_args["state_dim"]) for layer in decoder.layers[::2]}
    assert states == {(4608, 16)}


@pytest.mark.parametrize("depth", [1, 5])
def test_samba_begins_with_mamba(depth: int) -> None:
    decoder = samba.layout(**{**samba.PRESETS["tiny"], "depth": depth})
    assert [layer.mixer for layer in decoder.layers] == ["mamba", "attention", "mamba", "attention", "mamba"][:depth]
