"""Healing: train a converted model against its teacher, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from zoo.architectures.core.load import tokenizer
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.shards import refuse_existing
from zoo.conversion.core import data as sources
from zoo.conversion.core import recipe as recipes
from zoo.conversion.core.device import fast_products, make_accelerator
from zoo.conversion.core.healed import make_report, write
from zoo.conversion.core.lora import check_targets
from zoo.conversion.core.objectives import compiled_modules, objective_of, parts_to_compile
from zoo.conversion.core.optim import new_layers
from zoo.conversion.core.pair import load_student, load_teacher, new_parameters
from zoo.conversion.core.progress import Meter
from zoo.conversion.core.rows import Feed, Mixture
from zoo.conversion.core.settings import HealReport, Settings, choose
from zoo.conversion.core.stages import Stage
from zoo.conversion.core.tracking import check_log, tracker
from zoo.conversion.core.trainer import Trainer
from zoo.conversion.core.work import Work
from zoo.errors import ZooError


def heal(
    teacher: str | Path | nn.Module,
    student: str | Path,
    out: str | Path,
    *,
    recipe: str | Path = "quick",
    data: str | None = None,
    align_tokens: int | None = None,
    distill_tokens: int | None = None,
    resume: bool = False,
    seed: int | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    lr_align: float | None = None,
    lr_new: float | None = None,
    lr_copied: float | None = None,
    device: str | None = None,
    compile: bool | None = None,
    cache: str | Path | None = None,
    log: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> HealReport:
    """Train a converted model against its source, by the stages of a recipe.

    The default recipe, `quick`, has two. Stage *align* trains the new parameters alone: each swapped mixer gets the
    teacher's input and learns the output of the attention it replaces. Stage *distill* trains everything on the KL
    between the two models' predictions. All other arguments take the place of what the recipe says.

    Args:
        teacher: registered name, directory, hub id, or a loaded model of ours.
        student: a directory that `convert` wrote.
        out: the directory to write. Until it is whole, the run lives in `OUT.partial`.
        recipe: a YAML file of stages, or a preset: halo, lolcats, mamba_in_llama, mohawk, quick, radlads.
        data: a text file (`.xz` too), a directory of them, a `.jsonl` of conversations (lines with `messages`, of which
            the assistant's are learned), `datasets:NAME[:SPLIT]`, `recall` (documents that ask for what they said
            before), `self` (sampled from the teacher; the default), or shares of several: `"books.txt,recall=0.4"`.
        align_tokens, distill_tokens: budgets of these stages; by default 10M and 50M on a GPU, 40k and 160k on a CPU.
        resume: go on from `OUT.partial`; everything else must be as it was.
        seed: of the data's order.
        length: tokens per row. batch_size: rows per step.
        lr_align, lr_new, lr_copied: highest learning rates: of new parameters in `align`, of new and of transferred
            ones in `distill`.
        device: `cuda` or `cpu`; by default the GPU where there is one.
        compile: compile layers with torch.compile; by default on a GPU.
        cache: directory for tokenised text, recall rows and what the teacher said, to share between runs; by default
            inside `OUT.partial`.
        log: `tensorboard:DIR` or `trackio:PROJECT`, told every reading of the loss besides `metrics.jsonl`.
        progress: show progress on stderr.
        **settings: further fields of `Settings`, and `warmup` and `hold` of every stage.

    Raises:
        ZooError: bad input; nothing is written then.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was done is kept for `resume`.
    """
    out, folder = Path(out), Path(student)
    refuse_existing(out)
    check_log(log)
    given: dict[str, Any] = dict(
        data=data, align_tokens=align_tokens, distill_tokens=distill_tokens, seed=seed, length=length
    )
    given |= dict(batch_size=batch_size, lr_align=lr_align, lr_new=lr_new, lr_copied=lr_copied, **settings)
    asked = recipes.override(recipes.read(recipe), given)
    for stage in asked["stages"]:
        sources.check(stage.get("data", asked.get("data", "self")))
    new, accelerator = new_parameters(folder), make_accelerator(device)
    cuda = accelerator.device.type == "cuda"
    source = load_teacher(teacher, cuda)
    chosen = choose(cuda, source.config.max_position_embeddings, asked)
    check_batches(chosen, accelerator.num_processes)
    model, work = load_student(folder, source), Work(out)
    place = Path(cache) if cache else work.folder / "cache"
    objectives = make_objectives(chosen, model, source, new, place, cuda if compile is None else compile)
    if accelerator.is_main_process:
        work.open(out, {**chosen.flat(), "student": str(folder)}, resume)
    accelerator.wait_for_everyone()
    source.to(accelerator.device)
    model.to(accelerator.device)
    shown = progress and accelerator.is_main_process
    with Meter(chosen.stages, shown) as meter, fast_products(cuda):
        feeds = prepare(chosen, source, tokenizer(folder), place, meter, None if resume else work)
        told = tracker(log, out.name, chosen.flat()) if accelerator.is_main_process else None
        trainer = Trainer(model, new, chosen.loop(cuda), work, accelerator, told)
        try:
            train(trainer, chosen.stages, objectives, feeds, meter)
        finally:
            if told is not None:
                told.finish()
    report = make_report(trainer, chosen)
    if accelerator.is_main_process:
        write(model, folder, out, report)
        work.remove()
    accelerator.wait_for_everyone()
    return report


def check_batches(chosen: Settings, processes: int) -> None:
    """Refuse a batch that the processes cannot share."""
    for stage in chosen.stages:
        if stage.batch_size % processes:
            raise ZooError(
                f"batch_size was {stage.batch_size} in stage {stage.name}; "
                f"it must be a multiple of {processes} processes"
            )


def make_objectives(
    chosen: Settings, student: Any, teacher: Any, new: Sequence[str], cache: Path, compiled: bool
) -> list[tuple[nn.Module, list[Any]] | None]:
    """By stage, its loss and the modules to compile; None for a stage that has nothing to train.

    Raises:
        ZooError: a stage that this student cannot go through.
    """
    layers, found = new_layers(new), list[tuple[nn.Module, list[Any]] | None]()
    for stage in chosen.stages:
        if stage.lora:
            check_targets(student, stage.lora)
        if stage.mixers_alone and not layers:
            found.append(None)
            continue
        objective = objective_of(stage, student, teacher, layers, cache, chunk=chosen.chunk, compiled=compiled)
        found.append((objective, parts_to_compile(stage, student, teacher, layers) if compiled else []))
    return found


def prepare(
    chosen: Settings, teacher: ZooForCausalLM, names: Any, cache: Path, meter: Meter, work: Work | None
) -> list[Feed]:
    """The rows of each stage; if the data is bad, a `work` that was just begun goes.

    Stages of one kind of rows go on where the last of them ended.
    """
    groups: dict[tuple[str, int], list[Stage]] = {}
    for stage in chosen.stages:
        groups.setdefault((stage.data, stage.length), []).append(stage)
    try:
        mixtures = {key: mixture_of(chosen, group, teacher, names, cache, meter) for key, group in groups.items()}
    except ZooError:
        if work is not None:
            work.remove()
        raise
    feeds, taken = [], dict.fromkeys(groups, 0)
    for stage in chosen.stages:
        key = (stage.data, stage.length)
        feeds.append(Feed(mixtures[key], taken[key], stage.rows))
        taken[key] += stage.rows
    return feeds


def mixture_of(
    chosen: Settings, stages: list[Stage], teacher: ZooForCausalLM, names: Any, cache: Path, meter: Meter
) -> Mixture:
    """The rows of stages that read the same data at the same length."""
    plan = sources.Plan(
        length=stages[0].length,
        total=sum(stage.rows for stage in stages),
        seed=chosen.seed,
        cache=cache,
        pool_tokens=chosen.pool_tokens,
        pool_uses=chosen.pool_uses,
        sample_batch=chosen.sample_batch,
        say=meter.say,
    )
    return sources.mixture(sources.check(stages[0].data), teacher, names, plan)


def train(
    trainer: Trainer,
    stages: Sequence[Stage],
    objectives: Sequence[tuple[nn.Module, list[Any]] | None],
    feeds: Sequence[Feed],
    meter: Meter,
) -> None:
    """Every stage, from where the trainer's state stands."""
    trainer.resume()
    try:
        for index, (stage, chosen, feed) in enumerate(zip(stages, objectives, feeds, strict=True)):
            if chosen is None:
                trainer.skip(index)
                continue
            objective, modules = chosen
            with compiled_modules(modules):
                trainer.run(index, stage, objective, feed, meter)
    except KeyboardInterrupt as stop:
        meter.say(f"{stop}: the state is in {trainer.work.folder}; the same call with --resume goes on")
        raise
