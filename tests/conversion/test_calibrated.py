"""Starts from data against the same numbers written out, and RoPE kept, dropped or moved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from targets import RECURRENT
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import zoo
from zoo import registry
from zoo.cli import app
from zoo.conversion.core import calibrated
from zoo.conversion.core.convert import convert
from zoo.conversion.core.positions import UNTURNED
from zoo.conversion.core.verification import planned
from zoo.errors import ZooError

MEASURED = [name for name in RECURRENT if registry.get("mixers", name, "MODULE").starts]
IDS = torch.arange(3 * 24).mul(7).remainder(96).view(3, 24)
FORMS: dict[str, Any] = {  # the rate of decay per token, from a mixer's own parameter
    "gated_delta_net": lambda m: F.softplus(m.dt_bias) * m.A_log.exp(),
    "kimi_delta": lambda m: (F.softplus(m.dt_bias).view(6, -1) * m.A_log.exp()[:, None]).mean(1),
    "mamba2": lambda m: F.softplus(m.dt_bias) * m.A_log.exp(),
    "gla": lambda m: (-F.logsigmoid(m.decay_bias) / 16).view(6, -1).mean(1),
    "rwkv7": lambda m: (math.exp(-0.5) * m.decay_map.offset.sigmoid()).view(6, -1).mean(1),
    "gsa": lambda m: (-F.logsigmoid(m.decay_bias) / 8).log().mean(1).exp(),
}
BETAS: dict[str, Any] = {
    "gated_delta_net": lambda m: m.b_proj.bias.sigmoid(),
    "kimi_delta": lambda m: m.b_proj.bias.sigmoid(),
    "delta_net": lambda m: m.b_proj.bias.sigmoid(),
    "rwkv7": lambda m: m.rate_map.offset.sigmoid().view(6, -1).mean(1),
}


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """`IDS` as the text to measure on."""
    monkeypatch.setattr(calibrated, "sample", lambda plan, teacher, data: IDS)


def run(source: Path, out: Path, **options: Any) -> Any:
    return convert(source, out, **{"fresh_process": False, "init": "calibrated", "keep": [0, 2], **options})


def facts(source: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-life and beta of each head by transformers' own attention weights."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        weights = model(IDS, output_attentions=True).attentions[layer].double()
    lives, shares = torch.zeros(2, 6, dtype=torch.float64)
    for head in range(6):
        distances = [sum((t - s) * weights[b, head, t, s] for s in range(t)) for b in range(3) for t in range(24)]
        lives[head] = sum(distances) / len(distances)
        seen = [weights[b, head, t, : t + 1] for b in range(3) for t in range(1, 24)]
        shares[head] = sum(-(w * w.clamp(min=1e-30).log()).sum() / math.log(len(w)) for w in seen) / len(seen)
    return lives.clamp(min=1), 0.7 - 0.4 * shares


@pytest.mark.parametrize("mixer", MEASURED)
def test_starts_are_what_the_attention_does(mixer: str, hard_llama: Path, tmp_path: Path, sampled: None) -> None:
    report = run(hard_llama, tmp_path / "out", mixer=mixer)
    assert report.ok and any(row.operation == "measured(scale)" for row in report.plan.rows)
    model, (lives, beta) = zoo.from_pretrained(tmp_path / "out"), facts(hard_llama, 1)
    module = model.model.layers[1].mixer
    if mixer in FORMS:
        rates = (math.log(2) / lives).clamp(max=0.95 * math.exp(-0.5) if mixer == "rwkv7" else math.inf)
        torch.testing.assert_close(FORMS[mixer](module).double(), rates, rtol=2e-3, atol=0)
    if mixer in BETAS:
        torch.testing.assert_close(BETAS[mixer](module).double(), beta, rtol=2e-3, atol=0)
    again = planned(tmp_path / "out")
    assert all(torch.equal(again.tensor(row.target), report.plan.tensor(row.target)) for row in report.plan.rows)


@pytest.mark.parametrize("heads", [None, {1: [4, 1]}])
def test_no_other_scale_of_a_head_comes_nearer(
    heads: dict[int, list[int]] | None, hard_llama: Path, tmp_path: Path, sampled: None
) -> None:
    run(hard_llama, tmp_path / "out", mixer="gated_delta_net", keep_heads=heads)
    student, teacher = zoo.from_pretrained(tmp_path / "out"), zoo.from_pretrained(hard_llama)
    mixers = [model.model.layers[1].mixer for model in (student, teacher)]
    seen: list[torch.Tensor] = []
    calls: list[Any] = []
    mixers[1].register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    for mixer in mixers:
        mixer.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        teacher.model(input_ids=IDS, use_cache=False)
        mixers[0](*calls[0][:2], None)
    kept = heads[1] if heads else []
    places = [*sorted(kept), *(head for head in range(6) if head not in kept)]
    theirs, ours = (part.unflatten(-1, (6, 16)) for part in seen)
    for place, head in enumerate(places):
        best = (ours[:, :, place] * theirs[:, :, head]).sum() / ours[:, :, place].square().sum()
        scale = planned(tmp_path / "out").measured[1]["scale"][head]
        assert best.item() == pytest.approx(1, abs=2e-3) or scale == calibrated.LEAST, (head, best)


def test_text_and_samples_are_read_and_what_is_wrong_is_said(hard_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the old man by the river inn " * 400)
    runs = {name: run(hard_llama, tmp_path / name, mixer="gla", calibration_data=data) for name, data in
            (("file", str(text)), ("own", "self"))}  # fmt: skip
    records = [json.loads((tmp_path / name / "zoo_conversion.json").read_text())["measured"] for name in runs]
    assert records[0].keys() == {"1"} and records[0] != records[1]
    for options, message in (
        ({"init": "warm"}, "init was 'warm'; it must be one of plain, calibrated"),
        ({"mixer": "hedgehog"}, "hedgehog has nothing that is measured"),
        ({"calibration_data": "gone.txt"}, "'gone.txt' does not exist"),
        ({"rope": "all"}, "rope was 'all'; it must be one of keep, drop, hype"),
    ):
        with pytest.raises(ZooError, match=message):
            run(hard_llama, tmp_path / "bad", **{"mixer": "gla", **options})
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("heads", [None, {1: [4, 1]}])
@pytest.mark.parametrize("rope", ["drop", "hype"])
def test_rope_goes_where_it_is_asked_to(
    rope: str, heads: dict[int, list[int]] | None, hard_llama: Path, tmp_path: Path
) -> None:
    run(hard_llama, tmp_path / "out", mixer="gla", keep_heads=heads, rope=rope, init="plain")
    model, source = zoo.from_pretrained(tmp_path / "out"), zoo.from_pretrained(hard_llama)
    first, new = (model.model.layers[index].mixer for index in (0, 1))
    assert (new.other if heads else new).rope == (None if rope == "drop" else "default")
    softmax = [first, *([new.softmax] if heads else [])]
    assert [mixer.args.rope for mixer in softmax] == [None if rope == "hype" else "default"] * len(softmax)
    assert planned(tmp_path / "out").config.to_dict()["layers"] == model.config.to_dict()["layers"]
    with torch.no_grad():
        x = source.model(IDS, use_cache=False, output_hidden_states=True).hidden_states[0]
        q, k, v = (p(x).unflatten(-1, (-1, 16)) for p in (first.q_proj, first.k_proj, first.v_proj))
        plain = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), is_causal=True, enable_gqa=True)
        found: list[torch.Tensor] = []
        first.o_proj.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
        first.register_forward_pre_hook(lambda module, inputs: (x, *inputs[1:]))
        model.model(IDS, use_cache=False)
    same = torch.allclose(found[0], plain.transpose(1, 2).flatten(2), atol=1e-4)
    assert same == (rope == "hype")  # below 500 tokens the logits do not grow


def test_the_command_passes_them_on(hard_llama: Path, tmp_path: Path) -> None:
    for option, message in (("--init=warm", "init was 'warm'"), ("--rope=all", "rope was 'all'"),
                            ("--calibration-data=gone.txt", "'gone.txt' does not exist")):  # fmt: skip
        options = ["--mixer=gla", "--init=calibrated", option]
        done = CliRunner().invoke(app, ["convert", str(hard_llama), str(tmp_path / "out"), *options])
        assert done.exit_code == 2 and message in done.output


def test_logits_grow_beyond_the_first_tokens() -> None:
    floor, scale = UNTURNED["temperature"]
    growth = [1 + math.log1p((p + 1) // floor) * scale for p in (0, 498, 499, 9999)]
    assert growth[:2] == [1, 1] and growth[2] == pytest.approx(1 + math.log(2) / math.log(500))
    assert growth[3] == pytest.approx(math.log(9999 + 500) / math.log(500), rel=0.01)  # HyPE's own


def test_a_source_without_rope_has_none_to_move(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ZooError, match="no layer of the source has RoPE"):
        convert(tmp_path / "gpt2", tmp_path / "out", mixer="gla", rope="drop", dry_run=True)
