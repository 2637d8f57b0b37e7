"""Some heads of a layer stay softmax attention: with nothing from the others, the model is the source without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from targets import assert_learns
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import zoo
from zoo.cli import app
from zoo.conversion.core.convert import convert
from zoo.errors import ZooError

HEAD_DIM, HEADS = 16, 6
KEPT = {1: [4, 0], 2: [1, 0, 3]}  # of three heads for each KV head: one of each, then two and one


def run(source: Path, out: Path, **options: Any) -> Any:
    return convert(source, out, **{"fresh_process": False, "mixer": "gated_delta_net", "keep": [0], **options})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(80).view(2, 40) % 96, use_cache=False).logits


def silence(weight: torch.Tensor, heads: list[int]) -> None:
    """Nothing of these heads leaves an output projection `[D, H K]`."""
    with torch.no_grad():
        weight.unflatten(1, (-1, HEAD_DIM))[:, heads] = 0


@pytest.mark.parametrize("source", ["hard_llama", "normed_attention"])
@pytest.mark.parametrize("mixer", ["gated_delta_net", "mamba2", "rwkv7", "hedgehog"])
def test_without_the_others_it_is_the_source_without_their_heads(
    source: str, mixer: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(source)
    report = run(path, tmp_path / "out", mixer=mixer, keep_heads=KEPT)
    assert report.checks["expansion"]["passed"] and set(report.checks["expansion"]["layers"]) == {"1", "2"}
    load = zoo.from_pretrained if source == "normed_attention" else AutoModelForCausalLM.from_pretrained
    ours, theirs = zoo.from_pretrained(tmp_path / "out"), load(path)
    assert not torch.allclose(logits(ours), logits(theirs), atol=1e-2)
    for layer, heads in KEPT.items():
        silence(ours.model.layers[layer].mixer.o_proj.weight, list(range(len(heads), HEADS)))
        block = theirs.model.layers[layer]
        projection = (block.mixer if source == "normed_attention" else block.self_attn).o_proj
        silence(projection.weight, [head for head in range(HEADS) if head not in heads])
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert_learns(path, tmp_path / "out", set(report.plan.new), [1, 2])


def test_heads_keep_sharing_keys_where_each_is_read_by_as_many(hard_llama: Path, tmp_path: Path) -> None:
    heads = {0: [2, 5, 0, 4], 1: [3, 4], 2: [0, 1, 5]}
    plan = run(hard_llama, tmp_path / "out", keep=[], keep_heads=heads, dry_run=True).plan
    made = [layer.mixer_args["attention"] for layer in plan.config.decoder_config.layers]
    assert [(args["heads"], args["kv_heads"]) for args in made] == [(4, 2), (2, 1), (3, 3)]
    rows = [plan.by_target[f"model.layers.{i}.mixer.softmax.k_proj.weight"].step for i in range(3)]
    assert [row.operations[-1].options["heads"] for row in rows if row is not None] == [[0, 1], [1], [0, 0, 1]]


def test_what_is_written_says_which_heads(hard_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(hard_llama, out, mixer_args={"beta_scale": 2.0}, keep_heads={2: [0, 5]})
    record = json.loads((out / "zoo_conversion.json").read_text())
    options = {"kept": [0, 5], "mixer": "gated_delta_net", "mixer_args": {"beta_scale": 2.0}}
    assert [swap for swap in record["swaps"] if swap["layer"] == 2] == [
        {"layer": 2, "mixer": "head_hybrid", "args": options}
    ]
    layers = zoo.from_pretrained(out).config.decoder_config.layers
    assert layers[2].mixer_args["kept"] == (0, 5) and layers[2].mixer_args["mixer_args"]["beta_scale"] == 2.0
    assert "gated_delta_net beside the softmax heads 0, 5 in layers 2" in (out / "README.md").read_text()
    assert all(check["passed"] is not False for check in zoo.verify(out, fresh_process=False).values())


def test_the_command_keeps_heads(hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []

    def planned(*args: Any, **options: Any) -> Any:
        report = convert(*args, **{**options, "dry_run": True})
        plans.append(report.plan)
        return report

    monkeypatch.setattr("zoo.conversion.core.convert.convert", planned)
    call = ["convert", str(hard_llama), str(tmp_path / "out"), "--mixer", "gla", "--keep", "0", "--dry-run"]
    done = CliRunner().invoke(app, [*call, "--keep-heads", "1:0,4", "--keep-heads", "2:3"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    same = run(hard_llama, tmp_path / "out", mixer="gla", keep_heads={1: [0, 4], 2: [3]}, dry_run=True).plan
    assert [plan.table() for plan in plans] == [same.table()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_heads={0: [1]}), r"keep_heads names layer 0, which is not converted; it converts \[1, 2\]"),
        (dict(keep_heads={7: [1]}), "keep_heads names layer 7"),
        (dict(keep_heads={1: [6]}), r"layer 1: kept heads were \[6\]; each must be one of 0 to 5"),
        (dict(keep_heads={1: [2, 2]}), "named once"),
        (dict(keep_heads={1: []}), "kept heads were 0 of 6"),
        (dict(keep_heads={1: list(range(6))}), "kept heads were 6 of 6"),
        (dict(keep_heads={1: [0]}, mixer="attention(window=8)"), "layer 1: mixer 'attention' keeps all heads"),
    ],
)
def test_heads_that_cannot_be_kept_are_refused(
    hard_llama: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ZooError, match=message):
        run(hard_llama, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("heads", [["1"], ["1:"], ["1:0,x"], ["1:-1"], [":0"], ["1:0", "1:2"]])
def test_a_misspelt_option_is_one_line(hard_llama: Path, tmp_path: Path, heads: list[str]) -> None:
    options = [word for text in heads for word in ("--keep-heads", text)]
    call = ["convert", str(hard_llama), str(tmp_path / "out"), "--mixer", "gla", *options]
    result = CliRunner().invoke(app, call)
    assert result.exit_code != 0 and isinstance(result.exception, (ZooError, SystemExit))
    assert "--keep-heads" in str(result.exception) + result.output
