"""Stage align: every swapped mixer learns the output of the attention it replaces, on the teacher's own inputs.

B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architectures.core.watched import Seen, main_output, watched
from zoo.conversion.core.row_store import RowStore
from zoo.errors import ZooError


def observe(teacher: Any, layers: Sequence[int], ids: Tensor) -> dict[int, Seen]:
    """What the mixers of `layers` do when `teacher` reads `ids [B, T]`."""
    off = torch.autocast(ids.device.type, enabled=False)
    with torch.no_grad(), off, watched(teacher, layers) as seen:
        teacher.model(input_ids=ids, use_cache=False)
    return seen


class MixerCache:
    """Inputs and outputs of a teacher's mixers on disk, layer by layer, in the teacher's dtype.

    Args:
        folder: of this teacher.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stores: dict[int, RowStore] = {}

    def of(self, teacher: Any, layers: Sequence[int], ids: Tensor) -> dict[int, Seen]:
        """As `observe`, which runs only for rows that are new.

        Raises:
            ZooError: a mixer that also needs what earlier layers wrote, which is not kept.
        """
        if odd := [layer for layer in layers if teacher.model.layers[layer].reads]:
            raise ZooError(f"layer {odd[0]} reads what earlier layers write; leave teacher_cache out of align")
        new: dict[int, Seen] = {}
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            ctx = teacher.model.context(ids)

        def make(layer: int, missing: Tensor) -> Any:
            if not new:
                new.update(observe(teacher, layers, ids))
            wanted = (ids[:, None] == missing).all(-1).int().argmax(0)
            both = torch.stack([new[layer].x[wanted], new[layer].y[wanted]], dim=1)
            return both.cpu().contiguous().flatten(1).view(torch.uint8).numpy()

        shape = (2, ids.shape[1], teacher.config.hidden_size)
        found = {}
        for layer in layers:
            records = self.store(layer, shape, teacher.dtype).records(ids, partial(make, layer))
            x, y = torch.from_numpy(records).view(teacher.dtype).view(-1, *shape).to(ids.device).unbind(1)
            found[layer] = Seen(ctx=ctx, x=x, y=y)
        return found

    def store(self, layer: int, shape: tuple[int, ...], dtype: torch.dtype) -> RowStore:
        """The records of one layer."""
        if layer not in self.stores:
            self.stores[layer] = RowStore(self.folder / f"mixer{layer}-{shape[1]}", prod(shape) * dtype.itemsize)
        return self.stores[layer]


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """Mean square error over the mean square of `target`, in fp32."""
    target = target.float()
    return (y.float() - target).square().mean() / target.square().mean().clamp(min=1e-12)


class Align(nn.Module):
    """`ids [B, T]` to the mean relative error of all swapped mixers.

    Args:
        student, teacher: two models with the same layers up to the mixers of `layers`.
        layers: indices of the swapped layers.
        cache: what the teacher's mixers did before.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, layers: Sequence[int], cache: MixerCache | None = None
    ) -> None:
        super().__init__()
        self.student: Any = student
        self.layers, self.cache = list(layers), cache
        self.teacher: tuple[Any] = (teacher,)  # in a tuple: not a submodule, so neither trained nor saved

    def forward(self, ids: Tensor) -> Tensor:
        (teacher,) = self.teacher
        seen = observe(teacher, self.layers, ids) if self.cache is None else self.cache.of(teacher, self.layers, ids)
        errors = [self.error(layer, seen[layer]) for layer in self.layers]
        return torch.stack(errors).mean()

    def error(self, layer: int, seen: Seen) -> Tensor:
        mixer = self.student.model.layers[layer].mixer
        return relative_error(main_output(mixer(seen.x, seen.ctx, None)), seen.y)
