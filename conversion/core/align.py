"""Stage align: every swapped mixer learns the output of the attention it replaces, on the teacher's own inputs.

B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Seen:
    """What went through one mixer of the teacher: input and output `[B, T, D]`, and the call's context."""

    ctx: Any
    x: Tensor
    y: Tensor


@dataclass
class Recorder:
    """Filled by every forward of a model whose mixers are watched; `seen` maps the layer to its last call."""

    seen: dict[int, Seen] = field(default_factory=dict)

    def hook(self, layer: int) -> Any:
        def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.seen[layer] = Seen(ctx=inputs[1], x=inputs[0], y=main_output(output))

        return record


def main_output(output: Any) -> Tensor:
    """The hidden states of a mixer that may also write values for later layers."""
    y: Tensor = output[0] if isinstance(output, tuple) else output
    return y


@contextmanager
def watched(teacher: Any, layers: Sequence[int]) -> Iterator[Recorder]:
    """Record inputs and outputs of the mixers of `layers` during each forward of `teacher`."""
    recorder = Recorder()
    hooks = [teacher.model.layers[i].mixer.register_forward_hook(recorder.hook(i)) for i in layers]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """Mean square error over the mean square of `target`, in fp32."""
    target = target.float()
    return (y.float() - target).square().mean() / target.square().mean().clamp(min=1e-12)


class Align(nn.Module):
    """`ids [B, T]` to the mean relative error of all swapped mixers.

    Args:
        student, teacher: two models with the same layers up to the mixers of `layers`.
        layers: indices of the swapped layers.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self.student: Any = student
        self.layers = list(layers)
        self.teacher: tuple[Any] = (teacher,)  # in a tuple: not a submodule, so neither trained nor saved

    def forward(self, ids: Tensor) -> Tensor:
        with (
            torch.no_grad(),
            torch.autocast(ids.device.type, enabled=False),
            watched(*self.teacher, self.layers) as recorder,
        ):
            self.teacher[0].model(input_ids=ids, use_cache=False)
        errors = [self.error(layer, recorder.seen[layer]) for layer in self.layers]
        return torch.stack(errors).mean()

    def error(self, layer: int, seen: Seen) -> Tensor:
        mixer = self.student.model.layers[layer].mixer
        return relative_error(main_output(mixer(seen.x, seen.ctx, None)), seen.y)
