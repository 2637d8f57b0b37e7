"""New parameters that start from what the attention does on text (Taylor-Calibrate, arXiv 2606.16429).

A state's half-life is the mean distance that the head attends over, the strength of writing follows the entropy of its
attention, and the output's scale is the least-squares one. Which parameters these are, each mixer says (`starts`).

N rows, B rows of a batch, T tokens, H heads.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from zoo import registry
from zoo.architectures.core.load import tokenizer
from zoo.architectures.core.mixer import Context, grouped, wide
from zoo.architectures.core.mixing import mixing_matrix
from zoo.architectures.core.operations import initial
from zoo.architectures.core.plan import Start
from zoo.conversion.core import data as sources
from zoo.conversion.core import models
from zoo.conversion.core.planner import Plan, Row
from zoo.conversion.core.rows import shown
from zoo.conversion.core.verify import layer_mixer
from zoo.errors import ZooError

INITS = ("plain", "calibrated")
ROWS, LENGTH = 8, 512
WEAK, STRONG = 0.3, 0.7  # beta of a head that attends to all tokens alike, and of one that attends to a single one
SHORTEST = 1.0  # tokens: a state that halves faster holds nothing
LEAST = 0.05  # of the plain start: a scale below would leave the mixer without a gradient
Found = Mapping[int, Mapping[str, list[float]]]  # by layer and meaning, a number for each head of the source


def check_init(plan: Plan, init: str, data: str) -> None:
    """Refuse an unknown `init`, one that changes nothing, and `data` that is not there; nothing is loaded.

    Raises:
        ZooError: as said.
    """
    if init not in INITS:
        raise ZooError(f"init was {init!r}; it must be one of {', '.join(INITS)}")
    if init == "plain":
        return
    if not any(starts(plan, index) for index in plan.swaps):
        mixers = ", ".join(sorted({swap.mixer for swap in plan.swaps.values()})) or "a model with no new layer"
        raise ZooError(f"init was 'calibrated', and {mixers} has nothing that is measured; use plain")
    sources.check(data)


def calibrate(plan: Plan, data: str) -> Plan:
    """`plan` with its new parameters started from measurements, which it keeps in `measured`.

    Args:
        data: text to measure on, as healing takes it: a file, `self` (sampled from the source), ...

    Raises:
        ZooError: unusable data.
    """
    teacher = models.unswapped(plan).requires_grad_(False)
    return started(plan, measure(plan, teacher, sample(plan, teacher, data)))


def starts(plan: Plan, index: int) -> tuple[Start, ...]:
    """The starts that a swapped layer has, of parameters that its arguments leave in place."""
    layer = plan.config.decoder_config.layers[index]
    cls = registry.get("mixers", str(layer.mixer), "MODULE")
    found: tuple[Start, ...] = cls.starts_of(cls.parse(layer.mixer_args))
    return tuple(start for start in found if prefix(index) + start.target in plan.by_target)


def prefix(index: int) -> str:
    return f"model.layers.{index}.mixer."


def started(plan: Plan, found: Found) -> Plan:
    """`plan` with the parameters of `starts` as `found`; the same numbers give the same plan."""
    rows = {}
    for index, numbers in found.items():
        layer = plan.config.decoder_config.layers[index]
        args = registry.get("mixers", str(layer.mixer), "MODULE").parse(layer.mixer_args)
        for start in starts(plan, index):
            if start.means in numbers:
                row = plan.by_target[prefix(index) + start.target]
                values = start.form(torch.tensor(numbers[start.means], dtype=torch.float64), args)
                rows[row.target] = _started(row, start, values)
    return replace(plan, rows=tuple(rows.get(row.target, row) for row in plan.rows), measured=found)


def _started(row: Row, start: Start, values: Tensor) -> Row:
    assert row.init is not None
    count = math.prod(row.shape)
    values = values.flatten().repeat_interleave(count // values.numel())
    if start.means == "scale":
        values = values * initial(row.init, row.target, 0).double().flatten()
    init = replace(row.init, kind="values", options={"values": values.tolist()})
    return replace(row, init=init, operation=f"measured({start.means})")


def measure(plan: Plan, teacher: Any, ids: Tensor) -> Found:
    """What the attention of each swapped layer with `starts` does on `ids [N, T]`, row by row."""
    layers = {index: teacher.model.layers[index].mixer for index in plan.swaps if starts(plan, index)}
    facts = run(teacher, ids, {index: partial(attended, layers[index]) for index in layers}, "measuring attention")
    found = {index: rates(facts[index]) for index in layers}
    students = {index: student(started(plan, found), index) for index in layers}
    heads = {index: order(plan, index) for index in layers}
    pairs = {index: partial(compared, heads[index], layers[index], *students[index]) for index in layers}
    sums = run(teacher, ids, pairs, "fitting outputs")
    return {index: {**found[index], "scale": scales(heads[index], sums[index])} for index in layers}


def run(teacher: Any, ids: Tensor, looks: Mapping[int, Any], what: str) -> dict[int, dict[str, Tensor]]:
    """The sums over all rows of what `looks[layer](x, ctx)` returns for the inputs of a layer's mixer."""
    sums: dict[int, dict[str, Tensor]] = {index: defaultdict(lambda: torch.zeros(())) for index in looks}

    def look(index: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for name, value in looks[index](*inputs[:2]).items():
            sums[index][name] = sums[index][name] + value

    console = Console(stderr=True)
    with ExitStack() as stack, torch.no_grad():
        for index in looks:
            hook = teacher.model.layers[index].mixer.register_forward_pre_hook(partial(look, index))
            stack.callback(hook.remove)
        for row in track(ids.split(1), what, console=console, disable=not console.is_terminal, transient=True):
            teacher.model(input_ids=row, use_cache=False)
    return sums


def attended(attention: Any, x: Tensor, ctx: Context) -> dict[str, Tensor]:
    """Of one row: the mean distance `[H]` in tokens from a query to what it attends to, and the mean share `[H]` of the
    largest entropy that its attention has."""
    weights = mixing_matrix(attention, x, ctx)[0]
    place = torch.arange(x.shape[1], device=x.device, dtype=weights.dtype)
    distance = (weights * (place[:, None] - place)).sum(-1)
    entropy = torch.special.entr(weights).sum(-1)[:, 1:] / (place[1:] + 1).log()
    return {"distance": distance.mean(-1), "entropy": entropy.mean(-1), "rows": torch.ones(())}


def rates(facts: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Decay and strength of writing of each head, from the sums of `attended`."""
    half_lives = (facts["distance"] / facts["rows"]).clamp(min=SHORTEST)
    spread = (facts["entropy"] / facts["rows"]).clamp(0, 1)
    return {"rate": numbers(math.log(2) / half_lives), "beta": numbers(STRONG + (WEAK - STRONG) * spread)}


def numbers(values: Tensor) -> list[float]:
    """As they are kept: rounded, so that the order of a sum does not show."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def student(plan: Plan, index: int) -> tuple[Any, str]:
    """The mixer of a swapped layer in fp32, and the name of its output projection."""
    mixer = layer_mixer(plan, index, plan.tensor, plan.config.decoder_config.layers[index])
    return mixer.float(), output_row(plan, index).target.removeprefix(prefix(index)).removesuffix(".weight")


def output_row(plan: Plan, index: int) -> Row:
    """The row of what the attention's output projection became."""
    return next(row for row in plan.rows if row.origin == prefix(index) + "o_proj.weight")


def order(plan: Plan, index: int) -> list[int]:
    """The source's head at each place of a swapped layer's output."""
    step = output_row(plan, index).step
    assert step is not None
    chosen = [each.options["heads"] for each in step.operations if each.name == "select_heads"]
    return list(chosen[-1]) if chosen else list(range(plan.source.decoder.layers[index].mixer_args["heads"]))


def compared(heads: list[int], attention: Any, mixer: Any, name: str, x: Tensor, ctx: Context) -> dict[str, Tensor]:
    """Of one row: the products of each head's output with the attention's, and with itself, both `[H]`."""
    theirs = grouped(entering(attention, "o_proj", x, ctx), len(heads))[:, :, heads]
    ours = grouped(entering(mixer, name, x, ctx), len(heads))
    return {"product": (ours * theirs).sum((0, 1, 3)), "square": ours.square().sum((0, 1, 3))}


def entering(mixer: nn.Module, name: str, x: Tensor, ctx: Context) -> Tensor:
    """What enters the module `name` of a mixer, in fp32."""
    seen: list[Tensor] = []
    hook = mixer.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        mixer.forward(x, ctx, None)  # not a call: it may be watched itself
    finally:
        hook.remove()
    return wide(seen[0])


def scales(heads: list[int], sums: Mapping[str, Tensor]) -> list[float]:
    """By head of the source, the factor that brings the outputs nearest to the attention's."""
    values = torch.ones(max(heads) + 1)
    values[heads] = (sums["product"] / sums["square"].clamp(min=1e-12)).clamp(min=LEAST)
    return numbers(values)


def sample(plan: Plan, teacher: Any, data: str) -> Tensor:
    """Rows `[N, T]` of a source of text, as healing reads it."""
    length = min(LENGTH, plan.config.max_position_embeddings)
    names = tokenizer(plan.source.checkpoint.path)
    with tempfile.TemporaryDirectory() as cache:
        wanted = sources.Plan(length=length, total=ROWS, seed=plan.seed, cache=Path(cache), pool_uses=1)
        rows = sources.mixture(sources.check(data), teacher, names, wanted).batch(0, ROWS)
    return torch.from_numpy(shown(rows)[0]).long()
