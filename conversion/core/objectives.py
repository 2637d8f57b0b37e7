"""What each stage of healing minimises, compiled where that pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from zoo.conversion.core.align import Align, MixerCache
from zoo.conversion.core.distill import Distill
from zoo.conversion.core.likeliest import Likeliest
from zoo.conversion.core.row_store import model_digest
from zoo.conversion.core.stages import Stage


def objective_of(
    stage: Stage, student: Any, teacher: Any, layers: Sequence[int], cache: Path, *, chunk: int, compiled: bool
) -> nn.Module:
    """The loss of a stage as a module; `layers` are the swapped ones, `cache` a directory."""
    if stage.kind == "matrix":
        from zoo.conversion.core.matrix import Matrix

        return Matrix(student, teacher, layers)
    folder = cache / f"teacher-{model_digest(teacher)}" if stage.teacher_cache else None
    if stage.kind == "align":
        return Align(student, teacher, layers, None if folder is None else MixerCache(folder))
    likeliest = None if folder is None else Likeliest(folder, stage.length, stage.teacher_cache, chunk)
    return Distill(student, teacher, stage.loss, chunk, compiled, likeliest)


def parts_to_compile(stage: Stage, student: Any, teacher: Any, layers: Sequence[int]) -> list[Any]:
    """The modules that a stage runs most."""
    if stage.kind == "matrix":
        return []
    if stage.kind == "align":
        return [student.model.layers[i].mixer for i in layers]
    return [*student.model.layers, *(teacher.model.layers if stage.hears_teacher else [])]


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
