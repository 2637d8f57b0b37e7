"""Recipes, and the losses, caches and adapters that a stage can have. N tokens, D hidden size, V vocabulary."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from zoo.architectures.core.load import from_pretrained
from zoo.conversion.core import recipe as recipes
from zoo.conversion.core import tracking
from zoo.conversion.core.align import Align, MixerCache
from zoo.conversion.core.convert import convert
from zoo.conversion.core.distill import Distill
from zoo.conversion.core.heal import heal
from zoo.conversion.core.likeliest import Likeliest, likeliest
from zoo.conversion.core.lora import add_adapters, merge_adapters
from zoo.conversion.core.settings import choose
from zoo.conversion.core.stages import Lora
from zoo.errors import ZooError

IDS = torch.arange(2 * 12).view(2, 12) % 90


@pytest.fixture(scope="module")
def student(hard_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stages") / "student"
    convert(hard_llama, out, mixer="gated_delta_net", keep=[2], fresh_process=False)
    return out


@pytest.fixture
def pair(hard_llama: Path, student: Path) -> tuple[Any, Any]:
    """Student and teacher."""
    return from_pretrained(student, dtype=torch.float32), from_pretrained(hard_llama, dtype=torch.float32).eval()


# ---- losses ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [5, 100])
def test_a_weighted_loss_is_torchs_over_the_learned_tokens(pair: tuple[Any, Any], chunk: int) -> None:
    ours, teacher = pair
    learned = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    loss = {"kl": 0.7, "reverse_kl": 0.2, "cross_entropy": 0.1}
    q, p = ours(IDS).logits.log_softmax(-1)[:, :-1], teacher(IDS).logits.log_softmax(-1)[:, :-1]
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    reverse = F.kl_div(p, q, log_target=True, reduction="none").sum(-1)
    ce = F.cross_entropy(q.transpose(1, 2), IDS[:, 1:], reduction="none")
    expected = (0.7 * kl + 0.2 * reverse + 0.1 * ce)[learned[:, :-1]].mean()
    assert Distill(ours, teacher, loss, chunk)(IDS, learned).item() == pytest.approx(expected.item(), rel=1e-4)


def test_cross_entropy_alone_does_not_run_the_teacher(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    expected = F.cross_entropy(ours(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert Distill(ours, object(), {"cross_entropy": 1.0})(IDS).item() == pytest.approx(expected.item(), rel=1e-5)


# ---- what the teacher said ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_a_cache_of_every_token_gives_the_full_divergence(pair: tuple[Any, Any], tmp_path: Path, name: str) -> None:
    ours, teacher = pair
    full = Distill(ours, teacher, {name: 1.0})(IDS)
    cached = Distill(ours, teacher, {name: 1.0}, cache=Likeliest(tmp_path, 12, 96))(IDS)
    assert cached.item() == pytest.approx(full.item(), rel=2e-3)  # fp16 on disk


def test_a_cache_of_few_tokens_takes_the_others_together_and_is_read_again(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    ours, teacher = pair
    first = Distill(ours, teacher, {"kl": 1.0}, cache=Likeliest(tmp_path, 12, 5))(IDS)
    p, q = teacher(IDS).logits.softmax(-1).double(), ours(IDS).logits.softmax(-1).double()
    best = p.topk(5).indices
    p, q = (torch.cat([x.gather(-1, best), 1 - x.gather(-1, best).sum(-1, keepdim=True)], -1) for x in (p, q))
    assert first.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=2e-3)
    first.backward()
    assert all(w.grad.isfinite().all() for w in ours.parameters() if w.grad is not None)
    again = Distill(ours, teacher, {"kl": 1.0}, cache=Likeliest(tmp_path, 12, 5))
    again.hidden = lambda ids: pytest.fail("the teacher ran")  # type: ignore[method-assign]
    assert again(IDS.flip(0)).item() == pytest.approx(first.item(), rel=1e-5)


def test_a_mass_of_nothing_stays_finite() -> None:
    *_, rest = likeliest(torch.tensor([[0.0, -200.0, -200.0]]), 1)
    assert rest.isfinite().all()


def test_cached_inputs_align_as_the_teacher_itself(pair: tuple[Any, Any], tmp_path: Path) -> None:
    ours, teacher = pair
    expected = Align(ours, teacher, [0, 1])(IDS)
    assert torch.equal(Align(ours, teacher, [0, 1], MixerCache(tmp_path))(IDS), expected)
    teacher.model.layers[0].register_forward_hook(lambda *args: pytest.fail("the teacher ran"))
    assert torch.equal(Align(ours, teacher, [1, 0], MixerCache(tmp_path))(IDS), expected)


# ---- adapters -------------------------------------------------------------------------------------------------------
def test_adapters_merge_to_the_weights_of_their_formula(pair: tuple[Any, Any]) -> None:
    pytest.importorskip("peft")
    ours, _ = pair
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    add_adapters(ours, Lora(2, 6.0, ("q_proj", "o_proj")))
    factors = {name: p for name, p in ours.named_parameters() if ".lora_" in name}
    for parameter in factors.values():
        torch.nn.init.normal_(parameter, std=0.1)
    adapted = ours(IDS).logits
    grown = {
        name.split(".lora_A")[0]: factors[name.replace("lora_A", "lora_B")] @ p
        for name, p in factors.items()
        if "lora_A" in name
    }
    merge_adapters(ours)
    after = ours.state_dict()
    assert after.keys() == before.keys() and len(grown) == 6
    for name in before:
        expected = before[name] + 3.0 * grown.get(name.removesuffix(".weight"), torch.zeros(()))
        torch.testing.assert_close(after[name], expected)
    torch.testing.assert_close(ours(IDS).logits, adapted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_no_checkpoint(whole: bool, hard_llama: Path, student: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    if whole:
        shutil.copytree(hard_llama, adapter)
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    calls: list[Callable[[], Any]] = [
        lambda: from_pretrained(adapter),
        lambda: from_pretrained(adapter, attention="quest"),
        lambda: convert(adapter, tmp_path / "out", mixer="gla", dry_run=True),
        lambda: heal(adapter, student, tmp_path / "out", align_tokens=64, device="cpu"),
    ]
    for call in calls:
        with pytest.raises(ZooError, match=r"is a LORA adapter of org/base .*merge"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# ---- logging --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("tensorboard:runs", "tensorboard is not installed: pip install tensorboard"),
        ("trackio:name", "trackio is not installed: pip install trackio"),
        ("tensorboard:", "must be tensorboard:DIR or trackio:PROJECT"),
        ("wandb:name", "must be tensorboard:DIR or trackio:PROJECT"),
    ],
)
def test_a_log_that_cannot_be_is_refused(
    log: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ZooError, match=message):
        heal("./missing", "./missing", tmp_path / "out", log=log)


def test_a_tracker_is_told_every_reading(
    hard_llama: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, Any]] = []

    class Fake:
        def __init__(self, name: str, where: str) -> None:
            told.append(("init", (name, where)))

        def start(self) -> None:
            told.append(("start", None))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append(("settings", values))

        def log(self, values: dict[str, float], step: int) -> None:
            told.append(("log", (step, values)))

        def finish(self) -> None:
            told.append(("finish", None))

    monkeypatch.setattr(tracking, "find_spec", lambda name: True)
    monkeypatch.setattr(tracking, "TensorBoardTracker", Fake)
    (tmp_path / "t.txt").write_text("the river old man by inn " * 50)
    options: dict[str, Any] = {"align_tokens": 128, "distill_tokens": 320, "length": 16, "batch_size": 2}
    options |= {"data": str(tmp_path / "t.txt"), "device": "cpu", "progress": False}
    report = heal(hard_llama, student, tmp_path / "out", log="tensorboard:runs", **options)
    assert [what for what, _ in told] == ["init", "start", "settings", "log", "log", "log", "finish"]
    assert told[0][1] == ("out", "runs") and told[2][1]["align.tokens"] == 128
    assert all(isinstance(value, (int, float, str, bool)) for value in told[2][1].values())
    (_, align), (_, first), (_, last) = (values for what, values in told if what == "log")
    curves = report.curves
    assert align["align/loss"] == curves["align"][0][1] and "distill/lr_0" in last
    assert [first["distill/loss"], last["distill/loss"]] == [loss for _, loss in curves["distill"]]
    assert [values[0] for what, values in told if what == "log"] == [128, 128 + 160, 128 + 320]


# ---- whole runs -----------------------------------------------------------------------------------------------------
RECIPE = """
data: DATA
stages:
  - {stage: align, tokens: 64, length: 16, batch_size: 2, lr_copied: 1e-3, teacher_cache: true}
  - {stage: distill, tokens: 64, epochs: 2, length: 16, batch_size: 2, teacher_cache: {k: 8}}
  - {stage: distill, tokens: 64, length: 16, batch_size: 2, lr_new: 0, lr_copied: 1e-2,
     loss: {reverse_kl: 1, cross_entropy: 0.5}, lora: {rank: 2, targets: [q_proj]}}
  - {stage: long, tokens: 128, length: 64, batch_size: 1}
"""


@pytest.mark.parametrize("step", [7, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4, 9))])
def test_a_recipe_killed_in_any_stage_ends_as_the_whole_run(
    step: int, hard_llama: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2 + 4 + 2 + 2 steps; the seventh is in the stage with adapters."""
    import signal

    from safetensors.torch import load_file

    from zoo.conversion.core import trainer

    pytest.importorskip("peft")
    (tmp_path / "text.txt").write_text("the river old man by inn " * 200)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("DATA", str(tmp_path / "text.txt")))
    options: dict[str, Any] = {"recipe": tmp_path / "r.yaml", "progress": False, "device": "cpu"}
    whole = heal(hard_llama, student, tmp_path / "whole", **options)
    assert list(whole.curves) == ["align", "distill", "distill_2", "long"] and whole.tokens == 64 + 128 + 64 + 128
    taken, take = [0], trainer.Trainer._step

    def stepped(self: trainer.Trainer, *args: Any) -> Any:
        taken[0] += 1
        if taken[0] == step:
            signal.raise_signal(signal.SIGINT)
        return take(self, *args)

    monkeypatch.setattr(trainer.Trainer, "_step", stepped)
    with pytest.raises(KeyboardInterrupt):
        heal(hard_llama, student, tmp_path / "parted", **options)
    parted = heal(hard_llama, student, tmp_path / "parted", resume=True, **options)
    assert parted.curves == whole.curves
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parted"))
    assert one.keys() == load_file(student / "model.safetensors").keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- recipes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", recipes.presets())
def test_every_preset_can_be_run(name: str) -> None:
    assert all(stage.steps for stage in choose(True, 32_768, recipes.read(name)).stages)


def test_the_documents_example_can_be_run(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "healing.md").read_text()
    (tmp_path / "r.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    chosen = choose(True, 32_768, recipes.read(tmp_path / "r.yaml"))
    assert [stage.name for stage in chosen.stages] == ["align", "distill", "distill_2", "long"]
    assert chosen.seed == 1 and [stage.lora is not None for stage in chosen.stages] == [False, False, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: []", "a list of at least one stage"),
        ("stages: [{stage: aling}]", r"stage 1 was 'aling'; its key `stage` must be one of matrix, align"),
        ("stages: [{stage: align, tokes: 5}]", r"stage 1 \(align\) has the unknown key 'tokes'; is 'tokens' meant"),
        ("stages: [{stage: align, tokens: many}]", r"tokens was 'many'; it must be a whole number"),
        ("stages: [{stage: align, hold: 2}]", r"hold was 2; it must be a number from 0 to 1"),
        ("stages: [{stage: distill, loss: {kll: 1}}]", r"loss was .*weights of kl, reverse_kl, cross_entropy"),
        ("stages: [{stage: distill, lora: {rank: 2}}]", r"lora was .*alpha is twice the rank"),
        ("step: 3\nstages: [align]", r"unknown key 'step'"),
        ("stages: [", "is no YAML"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ZooError, match=message):
        heal("./missing", "./missing", tmp_path / "out", recipe=tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"stage": "align", "loss": {"kl": 1.0}}, "stages distill and long take it"),
        ({"stage": "long", "teacher_cache": 4}, "asks the teacher for nothing"),
        ({"stage": "distill", "lr_new": 0.0, "lr_copied": 0.0}, "nothing would train"),
        ({"stage": "long", "length": 4096}, "teacher reads at most 128"),  # its rows would be sampled
    ],
)
def test_fields_that_do_not_go_together_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        choose(False, 128, {"stages": [entry]})
