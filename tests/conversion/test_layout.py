"""Layout text."""

from __future__ import annotations

import pytest

from zoo.architectures.core.layout import parse_layout
from zoo.errors import ZooError


def names(text: str, depth: int) -> list[str]:
    return [name for name, _ in parse_layout(text, depth)]


def test_repeats_groups_and_tiling() -> None:
    three_to_one = ["gla"] * 3 + ["attention"]
    assert names("gla*3,attention", 8) == three_to_one * 2
    assert names("gla*3,attention", 6) == [*three_to_one, "gla", "gla"]
    assert names("(gla*3, attention)*2", 8) == three_to_one * 2
    assert names(" gla ", 2) == ["gla", "gla"]


def test_arguments() -> None:
    text = "attention(window=64, sinks=1)*2, gla(gate=none, flag=true, kind=silu, scale=-0.5, word='a b')"
    items = parse_layout(text, 3)
    assert items[0] == items[1] == ("attention", {"window": 64, "sinks": 1})
    assert items[2] == ("gla", {"gate": None, "flag": True, "kind": "silu", "scale": -0.5, "word": "a b"})
    items[0][1]["window"] = 1
    assert items[1][1]["window"] == 64, "layers must not share one dict"


@pytest.mark.parametrize("text", ["", "gla*0", "gla*", "gla**2", "3", "gla(1)", "gla.x", "gla+gla", "(", "gla(x=y())"])
def test_anything_else_is_one_line_of_error(text: str) -> None:
    with pytest.raises(ZooError) as caught:
        parse_layout(text, 4)
    assert "\n" not in str(caught.value)


def test_unknown_mixers_are_suggested_and_too_many_refused() -> None:
    with pytest.raises(ZooError, match="gated_delta_net"):
        parse_layout("gated_deltanet*3,attention", 4)
    with pytest.raises(ZooError, match="5 layers; the model has 4"):
        parse_layout("gla*5", 4)
