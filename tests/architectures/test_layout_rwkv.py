"""What the layouts of RWKV and xLSTM put where."""

from __future__ import annotations

import pytest

from zoo.architectures import eagle, finch, goose, rwkv4, xlstm
from zoo.errors import ZooError


def test_goose_hands_the_first_value_on() -> None:
    layers = goose.layout(**goose.PRESETS["0b4"]).layers
    assert [layer.mixer_args["first_value"] for layer in layers] == ["write", *["read"] * 23]
    assert {layer.channel_args["gate"] for layer in layers} == {False}
    assert layers[0].mixer_args["heads"] == 16 and layers[0].channel_args["intermediate_size"] == 4096


def test_widths_of_the_channels() -> None:
    presets = ((rwkv4, "7b", 16384), (eagle, "7b", 14336), (finch, "3b", 8960), (goose, "2b9", 10240))
    for module, preset, width in presets:
        layers = module.layout(**module.PRESETS[preset]).layers
        assert {layer.channel_args["intermediate_size"] for layer in layers} == {width}
        assert [layer.mixer_args["layer_index"] for layer in layers] == list(range(len(layers)))
        assert {layer.channel_args.get("weighs", "own") for layer in layers} == {
            "own" if module in (rwkv4, eagle) else "before"
        }


def test_the_embedding_is_normed() -> None:
    for module in (rwkv4, eagle, finch, goose):
        decoder = module.layout(**module.PRESETS["tiny"])
        assert decoder.embed.norm and not decoder.head.tied
        assert (decoder.norm.kind, decoder.norm.bias, decoder.norm.eps) == ("layer", True, 1e-5)


def test_xlstm_7b_is_as_published() -> None:
    decoder = xlstm.layout(**xlstm.PRESETS["7b"])
    args = decoder.layers[0].mixer_args
    assert (args["heads"], args["head_dim"], args["value_dim"], args["gate_softcap"]) == (8, 256, 512, 15.0)
    assert decoder.layers[0].channel_args["intermediate_size"] == 10944
    assert decoder.head.softcap == 30.0 and {layer.mixer for layer in decoder.layers} == {"mlstm"}


def test_scalar_memories_stand_where_they_are_put() -> None:
    sizes = dict(vocab_size=8, hidden_size=32, depth=5, heads=2)
    layers = xlstm.layout(**sizes, slstm_at=(1, 3)).layers
    assert [layer.mixer for layer in layers] == ["mlstm", "slstm", "mlstm", "slstm", "mlstm"]
    with pytest.raises(ZooError, match="key_size"):
        xlstm.layout(**{**sizes, "heads": 3})
