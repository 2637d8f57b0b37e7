"""Healing: train a converted model against its teacher, first each mixer alone, then everything on the logits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from zoo.architectures.core.checkpoint import Checkpoint, read_json
from zoo.architectures.core.load import from_pretrained, tokenizer
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.shards import atomic_directory, refuse_existing, write_json
from zoo.conversion.core import data as sources
from zoo.conversion.core.align import Align
from zoo.conversion.core.distill import Distill
from zoo.conversion.core.optim import new_layers
from zoo.conversion.core.progress import Meter
from zoo.conversion.core.rows import Mixture, Part
from zoo.conversion.core.settings import HealReport, Settings, choose
from zoo.conversion.core.trainer import Trainer
from zoo.conversion.core.work import Work
from zoo.errors import ZooError

RECORD = "zoo_conversion.json"
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "config.json", "verification.*")


def heal(
    teacher: str | Path | nn.Module,
    student: str | Path,
    out: str | Path,
    *,
    data: str = "self",
    align_tokens: int | None = None,
    distill_tokens: int | None = None,
    resume: bool = False,
    seed: int = 0,
    length: int | None = None,
    batch_size: int | None = None,
    lr_align: float | None = None,
    lr_new: float | None = None,
    lr_copied: float | None = None,
    device: str | None = None,
    compile: bool | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> HealReport:
    """Train a converted model against its source.

    Stage *align* trains the new parameters alone: each swapped mixer gets the teacher's input and learns the output of
    the attention it replaces. Stage *distill* trains everything on the KL between the two models' predictions.

    Args:
        teacher: registered name, directory, hub id, or a loaded model of ours.
        student: a directory that `convert` wrote.
        out: the directory to write. Until it is whole, the run lives in `OUT.partial`.
        data: a text file (`.xz` too), a directory of them, `datasets:NAME[:SPLIT]`, `recall` (documents that ask for
            what they said before), `self` (sampled from the teacher), or shares of several: `"books.txt,recall=0.4"`.
        align_tokens, distill_tokens: budgets; by default 10M and 50M on a GPU, 40k and 160k on a CPU.
        resume: go on from `OUT.partial`; everything else must be as it was.
        seed: of the data's order.
        length: tokens per row. batch_size: rows per step.
        lr_align, lr_new, lr_copied: highest learning rates, of new parameters in each stage and of transferred ones.
        device: `cuda` or `cpu`; by default the GPU where there is one.
        compile: compile layers with torch.compile; by default on a GPU.
        cache: directory for tokenised text and recall rows, to share between runs; by default inside `OUT.partial`.
        progress: show progress on stderr.
        **settings: further fields of `Settings`.

    Raises:
        ZooError: bad input; nothing is written then.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was done is kept for `resume`.
    """
    out, folder = Path(out), Path(student)
    refuse_existing(out)
    parts, new = sources.check(data), new_parameters(folder)
    accelerator = make_accelerator(device)
    cuda = accelerator.device.type == "cuda"
    source = load_teacher(teacher, cuda)
    given: dict[str, Any] = dict(data=data, align_tokens=align_tokens, distill_tokens=distill_tokens, seed=seed)
    given |= dict(
        length=length, batch_size=batch_size, lr_align=lr_align, lr_new=lr_new, lr_copied=lr_copied, **settings
    )
    chosen = choose(cuda, source.config.max_position_embeddings, given)
    if chosen.batch_size % accelerator.num_processes:
        raise ZooError(
            f"batch_size was {chosen.batch_size}; it must be a multiple of {accelerator.num_processes} processes"
        )
    model, names, work = load_student(folder, source), tokenizer(folder), Work(out)
    if accelerator.is_main_process:
        work.open(out, {**asdict(chosen), "student": str(folder)}, resume)
    accelerator.wait_for_everyone()
    source.to(accelerator.device)
    model.to(accelerator.device)
    shown = progress and accelerator.is_main_process
    with Meter(chosen.stages, chosen.batch_size * chosen.length, shown) as meter, fast_products(cuda):
        plan = data_plan(chosen, Path(cache) if cache else work.folder / "cache", meter)
        mixture = prepare(parts, source, names, plan, None if resume else work)
        trainer = Trainer(model, new, mixture, chosen.loop(cuda), work, accelerator)
        train(trainer, source, chosen, cuda if compile is None else compile, meter)
    report = make_report(trainer, chosen)
    if accelerator.is_main_process:
        write(model, folder, out, report)
        work.remove()
    accelerator.wait_for_everyone()
    return report


def data_plan(chosen: Settings, cache: Path, meter: Meter) -> sources.Plan:
    """What the run asks of its data."""
    return sources.Plan(
        length=chosen.length,
        total=chosen.rows,
        seed=chosen.seed,
        cache=cache,
        pool_tokens=chosen.pool_tokens,
        pool_uses=chosen.pool_uses,
        sample_batch=chosen.sample_batch,
        say=meter.say,
    )


def prepare(parts: list[Part], teacher: ZooForCausalLM, names: Any, plan: sources.Plan, work: Work | None) -> Mixture:
    """The run's rows; if the data is bad, a `work` that was just begun goes."""
    try:
        return sources.mixture(parts, teacher, names, plan)
    except ZooError:
        if work is not None:
            work.remove()
        raise


def make_report(trainer: Trainer, chosen: Settings) -> HealReport:
    """What a finished run did."""
    return HealReport(
        settings=asdict(chosen),
        curves=trainer.progress.curves,
        tokens=trainer.progress.rows * chosen.length,
        seconds=trainer.progress.seconds,
        device=device_name(trainer.accelerator.device),
    )


def train(trainer: Trainer, teacher: ZooForCausalLM, chosen: Settings, compiled: bool, meter: Meter) -> None:
    """Both stages, from where the trainer's state stands."""
    trainer.resume()
    align, distill = chosen.stages
    student: Any = trainer.student
    layers = new_layers(trainer.new)
    try:
        if align.steps and layers:
            mixers = [student.model.layers[i].mixer for i in layers]
            objective = Align(student, teacher, layers)
            with compiled_modules(mixers if compiled else []):
                trainer.run(0, align, objective, meter)
        else:
            trainer.skip(0)
        blocks = [*student.model.layers, *teacher.model.layers] if compiled else []
        with compiled_modules(blocks):
            trainer.run(1, distill, Distill(student, teacher, chosen.chunk, compiled), meter)
    except KeyboardInterrupt as stop:
        meter.say(f"{stop}: the state is in {trainer.work.folder}; the same call with --resume goes on")
        raise


@contextmanager
def compiled_modules(modules: list[Any]) -> Iterator[None]:
    """Each module compiled on its own: layers of one kind share one graph."""
    for module in modules:
        module.compile(dynamic=False)
    try:
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


@contextmanager
def fast_products(cuda: bool) -> Iterator[None]:
    """fp32 products in tf32 on a GPU, inside the `with` only."""
    before = torch.get_float32_matmul_precision()
    if cuda:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def make_accelerator(device: str | None) -> Accelerator:
    """bf16 autocast on a GPU, fp32 on a CPU."""
    if device not in (None, "cpu", "cuda"):
        raise ZooError(f"device was {device!r}; it must be cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ZooError("device was 'cuda'; torch finds no GPU: leave device out, or use cpu")
    cuda = torch.cuda.is_available() and device != "cpu"
    if PartialState._shared_state and (PartialState().device.type == "cuda") != cuda:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process was on another device
    return Accelerator(mixed_precision="bf16" if cuda else "no", cpu=not cuda)


def device_name(device: torch.device) -> str:
    """What reports call a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def new_parameters(student: Path) -> list[str]:
    """Names of the parameters that conversion added, as it recorded them."""
    if not (student / RECORD).is_file():
        raise ZooError(f"{student} has no {RECORD}; student must be a directory that convert wrote")
    new = read_json(student / RECORD, "conversion record").get("new")
    if not isinstance(new, list):
        raise ZooError(f"{student / RECORD} does not list the new parameters; convert again")
    return new


def load_teacher(teacher: str | Path | nn.Module, cuda: bool) -> ZooForCausalLM:
    """The teacher, frozen, in evaluation mode: bf16 on a GPU, fp32 on a CPU."""
    if isinstance(teacher, nn.Module):
        if not isinstance(teacher, ZooForCausalLM):
            raise ZooError(f"teacher is a {type(teacher).__name__}; load it with zoo.from_pretrained, or pass its path")
        return teacher.eval().requires_grad_(False)
    model = from_pretrained(teacher, dtype=torch.bfloat16 if cuda else torch.float32)
    return model.eval().requires_grad_(False)


def load_student(folder: Path, teacher: ZooForCausalLM) -> ZooForCausalLM:
    """The student with fp32 parameters.

    Raises:
        ZooError: it was not made from this teacher.
    """
    model = from_pretrained(folder, dtype=torch.float32)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(model.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ZooError(
                f"the student has {name} {ours}, the teacher {theirs}; give the student's own source as teacher"
            )
    return model


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
        "data": f"`{report.settings['data']}`",
        "tokens": f"{report.tokens:,}, rows of {report.settings['length']}",
        "device and time": f"{report.device}, {report.seconds:.0f} s",
        **{f"{name} loss": f"{curve[0][1]:.4g} to {curve[-1][1]:.4g}" for name, curve in report.curves.items()},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    head = "Trained against its base model; `healing.json` has settings and curves. Checks above are from before it."
    return f"## Healing\n\n{head}\n\n| | |\n|---|---|\n{table}"
