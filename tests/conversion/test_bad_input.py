"""Bad input to a conversion: one line that names the cause and the fix, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zoo.conversion.core.convert import convert
from zoo.errors import ZooError


def edit(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def drop_key(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["hidden_size"]
    file.write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def nothing(folder: Path) -> None:
    pass


CASES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "missing path": (shutil.rmtree, {}, "no directory at .*check the path"),
    "unsupported model_type": (edit(model_type="opt"), {}, "'opt' is not supported.*llama"),
    "no model_type": (edit(model_type=None), {}, "supported are: .*llama"),
    "truncated shard": (truncate, {}, "is truncated"),
    "corrupt config": (lambda folder: (folder / "config.json").write_text('{"a": '), {}, "not valid JSON"),
    "incomplete config": (drop_key, {}, "lacks 'hidden_size'"),
    "config of another size": (edit(intermediate_size=44), {}, "has shape .*config asks for"),
    "config with more layers": (edit(num_hidden_layers=4), {}, "is missing"),
    "keep out of range": (nothing, {"keep": [0, 3]}, "keep names layer 3; the model has layers 0 to 2"),
    "negative keep": (nothing, {"keep": [-1]}, "layer -1"),
    "unknown mixer": (nothing, {"mixer": "gated_deltanet"}, "did you mean gated_delta_net"),
    "unknown mixer in a layout": (nothing, {"mixer": None, "layout": "gated_delta*3,attention"}, "gated_delta_net"),
    "no mixer": (nothing, {"mixer": None}, "exactly one"),
    "mixer and layout": (nothing, {"layout": "gla*3"}, "exactly one"),
    "layout too long": (nothing, {"mixer": None, "layout": "gla*4"}, "4 layers; the model has 3"),
    "tokenizer missing": (remove_tokenizer, {}, "has no tokenizer"),
    "bad shard size": (nothing, {"max_shard_size": "big"}, "shard size"),
    "bad argument": (nothing, {"mixer": "attention(window=0)"}, "window was 0"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dry_run", [False, True])
def test_one_line_and_nothing_written(name: str, dry_run: bool, hard_llama: Path, tmp_path: Path) -> None:
    change, options, words = CASES[name]
    source = tmp_path / "source"
    shutil.copytree(hard_llama, source)
    change(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ZooError, match=words) as caught:
        convert(source, tmp_path / "out", **{"mixer": "gated_delta_net", "dry_run": dry_run, **options})
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_output_is_untouched(hard_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ZooError, match="exists; choose another path"):
        convert(hard_llama, tmp_path / "mine", mixer="gated_delta_net")
    assert (tmp_path / "mine").read_text() == "precious"
