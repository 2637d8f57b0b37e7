"""Conversion: what is untouched is bit-identical, what is new is deterministic, what is carried is all there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from targets import MIXERS, assert_learns

import zoo
from zoo.architectures.core.checkpoint import Checkpoint
from zoo.conversion.core.convert import convert
from zoo.conversion.core.planner import build_plan, choose
from zoo.errors import ZooError


def run(source: Path, out: Path, **options: Any) -> Any:
    return convert(source, out, **{"fresh_process": False, **options})


def logits(model: Any, length: int = 24) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(length)[None] % model.config.vocab_size).logits


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("source", ["hard_llama", "normed_attention"])
def test_every_mixer_takes_attention_over(
    mixer: str, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    report = run(request.getfixturevalue(source), tmp_path / "out", mixer=mixer, keep=[1])
    assert report.ok and report.checks["expansion"]["passed"] is True
    assert report.checks["expansion"]["layers"].keys() == {"0", "2"}
    assert torch.isfinite(logits(zoo.from_pretrained(tmp_path / "out"))).all()
    assert_learns(request.getfixturevalue(source), tmp_path / "out", set(report.plan.new), [0, 2])


def test_the_whole_ladder_in_a_fresh_process(hard_llama: Path, tmp_path: Path) -> None:
    layout = "gated_delta_net,attention,attention(window=8,sinks=1)"
    report = convert(hard_llama, tmp_path / "out", layout=layout, max_shard_size="60KB")
    assert {name for name, check in report.checks.items() if check["passed"]} == {
        "tensors",
        "identity",
        "expansion",
        "window",
        "reload",
        "tokenizer",
    }
    written = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert written == {"ok": True, "checks": report.checks}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_untouched_tensors_are_the_sources_bytes(hard_llama: Path, tmp_path: Path) -> None:
    run(hard_llama, tmp_path / "out", mixer="gated_delta_net", keep=[0])
    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(hard_llama)
    assert torch.equal(ours.get("lm_head.weight"), theirs.get("lm_head.weight"))
    for mine, name in (
        ("model.layers.2.channel.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
        ("model.layers.0.mixer.k_proj.bias", "model.layers.0.self_attn.k_proj.bias"),
        ("model.layers.1.mixer.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"),
    ):
        assert torch.equal(ours.get(mine), theirs.get(name))


def test_kept_everywhere_it_is_the_source(hard_llama: Path, tmp_path: Path) -> None:
    report = run(hard_llama, tmp_path / "out", mixer="gated_delta_net", keep=[0, 1, 2])
    assert report.plan.new == [] and report.checks["identity"]["equal"]
    assert torch.equal(logits(zoo.from_pretrained(tmp_path / "out")), logits(zoo.from_pretrained(hard_llama)))


def test_a_window_changes_nothing_up_to_its_length_and_something_after(hard_llama: Path, tmp_path: Path) -> None:
    report = run(hard_llama, tmp_path / "out", mixer="attention", mixer_args={"window": 8, "sinks": 1})
    assert report.checks["window"]["layers"].keys() == {"0", "1", "2", "logits"}
    ours, theirs = (logits(zoo.from_pretrained(path)) for path in (tmp_path / "out", hard_llama))
    assert (ours - theirs)[:, :8].abs().max() <= 1e-5 * theirs.std()
    assert (ours - theirs)[:, 12:].abs().max() > 1e-3 * theirs.std()


def test_a_zoo_checkpoint_is_a_source_too(hard_llama: Path, tmp_path: Path) -> None:
    run(hard_llama, tmp_path / "one", mixer="gated_delta_net", keep=[1, 2])
    report = run(tmp_path / "one", tmp_path / "two", mixer="gated_delta_net", keep=[2])
    assert list(report.plan.swaps) == [1]
    run(hard_llama, tmp_path / "direct", mixer="gated_delta_net", keep=[2])
    one, two = Checkpoint(tmp_path / "two"), Checkpoint(tmp_path / "direct")
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.get(name), two.get(name)) for name in one.tensors)
    with pytest.raises(ZooError, match="layer 0 is gated_delta_net"):
        run(tmp_path / "one", tmp_path / "three", layout="gated_delta_net*3")


def test_bf16_stays_bf16_and_decays_stay_fp32(make_llama: Any, tmp_path: Path) -> None:
    source = make_llama()
    zoo.save(zoo.from_pretrained(source, dtype=torch.bfloat16), tmp_path / "half", tokenizer=zoo.tokenizer(source))
    report = run(tmp_path / "half", tmp_path / "out", mixer="gated_delta_net")
    wide = {row.target.rpartition(".")[2] for row in report.plan.rows if row.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias"}
    loaded = zoo.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: info.dtype for name, info in Checkpoint(tmp_path / "out").tensors.items()
    }


def test_the_same_conversion_gives_the_same_bytes(hard_llama: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        torch.manual_seed(len(name))
        run(hard_llama, tmp_path / name, layout="gla,gated_delta_net,attention")
    files = sorted((tmp_path / "one").glob("*.safetensors"))
    assert files and all(file.read_bytes() == (tmp_path / "two" / file.name).read_bytes() for file in files)


def test_a_dry_run_reads_no_tensor_and_writes_nothing(
    hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = run(hard_llama, tmp_path / "out", mixer="gated_delta_net", keep=[1])
    monkeypatch.setattr(Checkpoint, "get", lambda self, name: pytest.fail(f"read {name}"))
    dry = run(hard_llama, tmp_path / "dry", mixer="gated_delta_net", keep=[1], dry_run=True)
    assert dry.plan.table() == planned.plan.table() and dry.checks == {}
    assert not (tmp_path / "dry").exists()


def test_the_plan_says_what_happens(hard_llama: Path, tmp_path: Path) -> None:
    plan = run(hard_llama, tmp_path / "out", mixer="gated_delta_net", keep=[1], dry_run=True).plan
    row = plan.by_target["model.layers.0.mixer.v_proj.bias"]
    assert (row.operation, row.sources) == (
        "expand_heads(group=3, head_dim=16)",
        ("model.layers.0.self_attn.v_proj.bias",),
    )
    assert row.shape == (96,) and not row.new
    assert set(plan.transferred) | set(plan.new) == {row.target for row in plan.rows}
    assert "model.layers.0.mixer.A_log" in plan.new


def test_the_output_carries_what_a_user_needs(hard_llama: Path, tmp_path: Path) -> None:
    run(hard_llama, tmp_path / "out", mixer="gated_delta_net", keep=[1])
    out = tmp_path / "out"
    ours, theirs = zoo.tokenizer(out), zoo.tokenizer(hard_llama)
    messages = [{"role": "user", "content": "the old river"}]
    assert ours.chat_template == theirs.chat_template is not None
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert (out / "generation_config.json").read_bytes() == (hard_llama / "generation_config.json").read_bytes()
    record = json.loads((out / "zoo_conversion.json").read_text())
    assert record["keep"] == [1] and record["source"]["format"] == "llama"
    assert set(record["new"]).isdisjoint(record["transferred"])
    assert {row["target"] for row in record["plan"]} == Checkpoint(out).tensors.keys()
    assert os.stat(out).st_mode & 0o777 == 0o777 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_card_names_base_licence_plan_and_checks(make_llama: Any, tmp_path: Path) -> None:
    source = make_llama()
    front = "base_model: owner/base\nlicense: other\nlicense_name: llama3\nlanguage: en"
    (source / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    (source / "LICENSE").write_text("terms")
    run(source, tmp_path / "out", mixer="gated_delta_net", keep=[1])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "owner/base"
    assert (card.data.license, card.data.license_name) == ("other", "llama3")
    assert "gated_delta_net in layers 0, 2; attention kept in layers 1" in card.text
    assert "expand_heads" in card.text and "| identity | passed |" in card.text
    assert str(tmp_path) not in card.content
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


def test_hybrid_arguments_reach_the_mixer_or_are_refused(hard_llama: Path, tmp_path: Path) -> None:
    report = run(hard_llama, tmp_path / "out", mixer="gated_delta_net", mixer_args={"beta_scale": 2.0})
    assert report.plan.config.layers[0]["mixer_args"]["beta_scale"] == 2.0
    with pytest.raises(ZooError, match="plan: tensor"):
        run(hard_llama, tmp_path / "bad", mixer="gated_delta_net(head_dim=8)")
    with pytest.raises(ZooError, match="unknown argument 'nonsense'"):
        run(hard_llama, tmp_path / "bad", mixer="gated_delta_net(nonsense=8)")


def test_options_that_a_mixer_cannot_take_over_are_refused(normed_attention: Path) -> None:
    from dataclasses import replace

    from zoo.architectures.core.formats import read

    source = read(normed_attention)
    layers = tuple(replace(x, mixer_args={**x.mixer_args, "output_gate": True}) for x in source.decoder.layers)
    object.__setattr__(source, "decoder", replace(source.decoder, layers=layers))
    swaps = choose(source.decoder, "gated_delta_net", None, None, [])
    with pytest.raises(ZooError, match="layer 0 has attention with output_gate.*keep it"):
        build_plan(source, swaps)


def test_an_interrupted_conversion_keeps_what_is_finished_and_the_same_call_goes_on(
    hard_llama: Path, tmp_path: Path
) -> None:
    script = (
        "import sys, time, zoo.conversion.core.convert as c\n"
        "def stop(*a, **k):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "c.run_checks = stop\n"
        f"c.convert({str(hard_llama)!r}, {str(tmp_path / 'out')!r}, mixer='gated_delta_net')\n"
    )
    root = str(Path(zoo.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    child = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.readline() == b"ready\n", child.stderr.read()
    assert any(tmp_path.iterdir()), "it was writing"
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    run(hard_llama, tmp_path / "out", mixer="gated_delta_net")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.shared
def test_the_trained_llama_converts(shared: Path, tmp_path: Path) -> None:
    source = shared / "checkpoints" / "stories260K"
    report = run(source, tmp_path / "out", mixer="gated_delta_net", keep=[4])
    assert report.ok and report.checks["identity"]["passed"] and report.checks["expansion"]["passed"]
