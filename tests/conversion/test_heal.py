"""Healing from end to end, on a tiny Llama made here."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zoo.architectures.core.load import from_pretrained, tokenizer
from zoo.conversion.core import trainer
from zoo.conversion.core.convert import convert
from zoo.conversion.core.heal import heal
from zoo.errors import ZooError

TOKENS = {"align_tokens": 512, "distill_tokens": 512, "length": 32, "batch_size": 4}
SMALL: dict[str, Any] = {**TOKENS, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with weights large enough that its predictions say something, stored in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("teacher")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token=end, bos_token=end).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with gated delta nets in both layers."""
    folder = tmp_path_factory.mktemp("swapped") / "student"
    convert(teacher, folder, mixer="gated_delta_net", fresh_process=False)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"Paragraph {n} of some text that says {n * n} things." for n in range(400)))
    return str(file)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def kl(teacher: Path, student: Path) -> float:
    """Nats per token on tokens that no run has seen."""
    ids = torch.randint(1, 257, (16, 32), generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        p, q = (
            from_pretrained(x, dtype=torch.float32)(input_ids=ids).logits.log_softmax(-1) for x in (teacher, student)
        )
    return float(F.kl_div(q, p, log_target=True, reduction="sum") / ids.numel())


def interrupt_at(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Send Ctrl-C in the middle of step number `steps` of a run."""
    taken, step = [0], trainer.Trainer._step

    def stepped(self: trainer.Trainer, *args: Any) -> Any:
        taken[0] += 1
        if taken[0] == steps:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(trainer.Trainer, "_step", stepped)


# ---- what it does ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def healed(teacher: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Healed on text sampled from the teacher."""
    out = tmp_path_factory.mktemp("healed") / "out"
    options = {"align_tokens": 4096, "distill_tokens": 12_288, "batch_size": 8}
    heal(teacher, student, out, lr_align=0.02, lr_new=5e-3, lr_copied=5e-3, **{**SMALL, **options})
    return out


def test_healing_brings_the_student_back_to_its_teacher(teacher: Path, student: Path, healed: Path) -> None:
    report = json.loads((healed / "healing.json").read_text())
    align, distill = report["curves"]["align"], report["curves"]["distill"]
    assert align[-1][1] < 0.9 * align[0][1]
    assert distill[-1][1] < 0.6 * distill[0][1]
    assert kl(teacher, healed) < 0.7 * kl(teacher, student)
    assert report["tokens"] == 4096 + 12_288


def test_the_output_is_a_whole_checkpoint_with_the_students_dtypes(student: Path, healed: Path) -> None:
    before, after = weights(student), weights(healed)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert {t.dtype for t in after.values()} == {torch.bfloat16, torch.float32}
    assert from_pretrained(healed).dtype == torch.bfloat16
    assert tokenizer(healed)("some text").input_ids == tokenizer(student)("some text").input_ids
    assert (healed / "zoo_conversion.json").read_text() == (student / "zoo_conversion.json").read_text()
    assert "## Healing" in (healed / "README.md").read_text()
    assert not (healed / "verification.json").exists()  # its hashes are of the unhealed weights
    assert [path.name for path in healed.parent.iterdir()] == ["out"]


def test_align_trains_every_new_parameter_and_no_other(teacher: Path, student: Path, text: str, tmp_path: Path) -> None:
    heal(teacher, student, tmp_path / "out", data=text, lr_align=0.05, **{**SMALL, "distill_tokens": 0})
    record = json.loads((student / "zoo_conversion.json").read_text())
    before, after = weights(student), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(record["new"])


def test_distill_trains_every_parameter(teacher: Path, student: Path, text: str, tmp_path: Path) -> None:
    options = {**SMALL, "align_tokens": 0, "lr_new": 0.05, "lr_copied": 0.05}
    heal(teacher, student, tmp_path / "out", data=text, **options)
    before, after = weights(student), weights(tmp_path / "out")
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_passes_change_memory_and_not_the_result(teacher: Path, student: Path, text: str, tmp_path: Path) -> None:
    curves = []
    for passes in (1, 3):
        options = {**SMALL, "align_tokens": 0, "passes": passes}
        report = heal(teacher, student, tmp_path / str(passes), data=text, **options)
        curves.append([loss for curve in report.curves.values() for _, loss in curve])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.gpu
def test_a_gpu_heals_compiled_and_in_bf16(teacher: Path, student: Path, text: str, tmp_path: Path) -> None:
    options = {**SMALL, "device": "cuda", "distill_tokens": 8192, "lr_new": 5e-3, "lr_copied": 5e-3}
    report = heal(teacher, student, tmp_path / "out", data=text, **options)
    curve = report.curves["distill"]
    assert report.device != "cpu" and curve[-1][1] < 0.8 * curve[0][1]
    assert {n: t.dtype for n, t in weights(student).items()} == {
        n: t.dtype for n, t in weights(tmp_path / "out").items()
    }


# ---- interruption ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [3, 7])  # of 4 + 4: once in each stage
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    steps: int, teacher: Path, student: Path, text: str, tmp_path: Path
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    one = heal(teacher, student, whole, data=text, **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, steps)
        with pytest.raises(KeyboardInterrupt):
            heal(teacher, student, parted, data=text, **SMALL)
    assert not parted.exists() and (tmp_path / "parted.partial" / "state.pt").is_file()
    two = heal(teacher, student, parted, data=text, resume=True, **SMALL)
    assert one.curves == two.curves and one.tokens == two.tokens
    first, second = weights(whole), weights(parted)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parted", "whole"]


def test_an_interrupted_run_is_neither_overwritten_nor_resumed_with_other_settings(
    teacher: Path, student: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**SMALL, "data": text}
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            heal(teacher, student, tmp_path / "out", **{**options, "progress": True})
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(ZooError, match="unfinished run"):
        heal(teacher, student, tmp_path / "out", **options)
    with pytest.raises(ZooError, match=r"distill.tokens was 512 and is now 1024"):
        heal(teacher, student, tmp_path / "out", resume=True, **{**options, "distill_tokens": 1024})


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "missing.txt"}, "does not exist"),
        ({"data": "self=0.5"}, "add up to 1"),
        ({"length": 4096}, "teacher reads at most 128"),
        ({"device": "tpu"}, "device was 'tpu'"),
        ({"resume": True}, "nothing to resume"),
        ({"rate": 1}, "unknown setting 'rate'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: dict[str, Any], message: str, teacher: Path, student: Path, tmp_path: Path
) -> None:
    with pytest.raises(ZooError, match=message) as error:
        heal(teacher, student, tmp_path / "out", **{**SMALL, **options})
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_text_shorter_than_a_row_leaves_nothing(teacher: Path, student: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ZooError, match="one row takes 32"):
        heal(teacher, student, tmp_path / "out", data=str(tmp_path / "short.txt"), **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_only_converted_models_are_healed_and_nothing_is_overwritten(
    teacher: Path, student: Path, tmp_path: Path
) -> None:
    with pytest.raises(ZooError, match="must be a directory that convert wrote"):
        heal(teacher, teacher, tmp_path / "out", **SMALL)
    with pytest.raises(ZooError, match="exists"):
        heal(teacher, student, tmp_path, **SMALL)
    with pytest.raises(ZooError, match="load it with zoo.from_pretrained"):
        heal(torch.nn.Linear(1, 1), student, tmp_path / "out", **SMALL)
    assert list(tmp_path.iterdir()) == []


# ---- a trained model ------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.shared
def test_a_trained_story_teller_is_healed(shared: Path, tmp_path: Path) -> None:
    source, data = shared / "checkpoints" / "stories260K", shared / "corpora" / "tinystories"
    convert(source, tmp_path / "student", mixer="gated_delta_net", keep=[4], fresh_process=False)
    options = {"align_tokens": 20_000, "distill_tokens": 40_000, "length": 256, "progress": False, "device": "cpu"}
    report = heal(source, tmp_path / "student", tmp_path / "out", data=str(data), **options)
    curve = report.curves["distill"]
    assert curve[-1][1] < 0.5 * curve[0][1]
