"""Layouts of architectures with mixers side by side that no class of transformers confirms."""

from __future__ import annotations

import torch
from zoo_models import case_config, draw, forward, make

from zoo.architectures import hymba


def test_hymba_layers() -> None:
    decoder = hymba.layout(**hymba.PRESETS["1.5b"])
    firsts = [layer.mixer_args["first_args"] for layer in decoder.layers]
    assert [i for i, args in enumerate(firsts) if args.get("window") is None] == [0, 15, 31]
    assert all((args["window"], args["sinks"]) == (1024, 128) for i, args in enumerate(firsts) if i not in (0, 15, 31))
    assert {layer.mixer_args["second"] for layer in decoder.layers} == {"mamba"}
    assert decoder.vocab_size == 32001 + 128 and hymba.meta_ids(decoder) == list(range(32001, 32129))


def test_hymba_shares_keys_between_neighbours() -> None:
    pairs = [(i, i + 1) for i in range(1, 15, 2)] + [(16, 17, 18)] + [(i, i + 1) for i in range(19, 31, 2)]
    writers = hymba.shared_keys(32, (0, 15, 31))
    assert writers == {layer: group[0] for group in pairs for layer in group}
    names = [layer.mixer_args["first"] for layer in hymba.layout(**hymba.PRESETS["1.5b"]).layers]
    assert [i for i, name in enumerate(names) if name == "cross"] == [i for i, w in writers.items() if i != w]
    assert hymba.shared_keys(3, (0, 2)) == {}


def test_hymba_keeps_keys_once_per_pair() -> None:
    model = make("hymba/tiny")
    per_layer = [layer.state_bytes(40, 4) for layer in model.model.layers]
    mamba = model.model.layers[2].mixer.second.state_bytes(40, 4)
    assert per_layer[2] == mamba < per_layer[1] < per_layer[0]


def test_meta_tokens_stay_visible_beyond_every_window() -> None:
    """With Mamba's branch and the global layers silenced, a late token still sees a change of a meta token."""
    config = case_config("hymba/tiny")
    model, meta = make("hymba/tiny"), hymba.meta_ids(config.decoder_config)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.mixer.second_norm.weight.zero_()
            if index in (0, 3):
                layer.mixer.first_norm.weight.zero_()
    ids = torch.cat([torch.tensor([meta, meta]), draw(2, 40, vocab=250)], 1)
    changed = ids.clone()
    changed[:, 0] = 5
    plain = ids.clone()
    plain[:, 4] = (ids[:, 4] + 1) % 250
    late = slice(30, None)
    assert (forward(model, changed) - forward(model, ids))[:, late].abs().max() > 1e-4
    assert (forward(model, plain) - forward(model, ids))[:, late].abs().max() < 1e-6
