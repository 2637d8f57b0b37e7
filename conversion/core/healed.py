"""What a healing run leaves: the healed checkpoint, its report, a section of its card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zoo.architectures.core.checkpoint import Checkpoint
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.shards import atomic_directory, write_json
from zoo.conversion.core.device import device_name
from zoo.conversion.core.settings import HealReport, Settings
from zoo.conversion.core.trainer import Trainer

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "config.json", "verification.*")


def make_report(trainer: Trainer, chosen: Settings) -> HealReport:
    """What a finished run did."""
    return HealReport(
        settings=asdict(chosen),
        curves=trainer.progress.curves,
        tokens=trainer.progress.tokens,
        seconds=trainer.progress.seconds,
        device=device_name(trainer.accelerator.device),
    )


def write(model: ZooForCausalLM, student: Path, out: Path, report: HealReport) -> None:
    """The healed checkpoint: weights in the student's dtypes, everything else as conversion left it."""
    dtypes = {name: info.dtype for name, info in Checkpoint(student).tensors.items()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    model.config.dtype = model.get_input_embeddings().weight.dtype
    with atomic_directory(out) as folder:
        model.cpu().eval().requires_grad_(True).save_pretrained(folder)
        for file in student.iterdir():
            if not any(file.match(pattern) for pattern in WEIGHTS):
                copy = shutil.copytree if file.is_dir() else shutil.copyfile
                copy(file, folder / file.name)
        write_json(folder / "healing.json", report.to_dict())
        extend_card(folder / "README.md", report)


def extend_card(card: Path, report: HealReport) -> None:
    """A section on the healing at the end of the model card."""
    text = card.read_text(encoding="utf-8").rstrip() if card.is_file() else "# Healed model"
    card.write_text(f"{text}\n\n{healing_section(report)}\n", encoding="utf-8")


def healing_section(report: HealReport) -> str:
    """What was trained, on what, and what came of it."""
    rows: Mapping[str, str] = {
        "tokens": f"{report.tokens:,}",
        "device and time": f"{report.device}, {report.seconds:.0f} s",
        **{stage["name"]: stage_words(stage, report.curves.get(stage["name"])) for stage in report.settings["stages"]},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    head = "Trained against its base model; `healing.json` has settings and curves. Checks above are from before it."
    return f"## Healing\n\n{head}\n\n| | |\n|---|---|\n{table}"


def stage_words(stage: Mapping[str, Any], curve: list[list[float]] | None) -> str:
    """One stage in a cell of a table."""
    size = f"{stage['tokens']:,} tokens of `{stage['data']}`, rows of {stage['length']}"
    loss = " + ".join(f"{weight:g} {name}" for name, weight in stage["loss"].items())
    came = f"loss {curve[0][1]:.4g} to {curve[-1][1]:.4g}" if curve else "nothing to train"
    return ", ".join(filter(None, [size, loss, came]))
