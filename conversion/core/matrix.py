"""Stage matrix: every swapped mixer learns the matrix by which the attention it replaces mixes tokens (MOHAWK, Bick et
al. 2024, arXiv 2408.10189), on the teacher's own inputs.

B rows, T tokens, D hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architectures.core.mixer import Mixer
from zoo.architectures.core.mixing import mixing_matrix, value_heads
from zoo.architectures.core.watched import Seen
from zoo.conversion.core.align import observe
from zoo.errors import ZooError


class Matrix(nn.Module):
    """`ids [B, T]` to the mean, over rows, heads and swapped layers, of the squared Frobenius distance between the
    mixer's matrix and the attention's, each divided by its norm: from 0, for matrices alike up to a factor, to 4.

    The factor is left out because the norm and the projection after a head set its scale. It takes `[B, H, T, T]`
    numbers per layer: short rows are enough.

    Args:
        student, teacher: two models with the same layers up to the mixers of `layers`.
        layers: indices of the swapped layers.

    Raises:
        ZooError: a layer whose mixer, or the teacher's, has no such matrix, or not one for each of the same heads.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self.student: Any = student
        self.layers = list(layers)
        self.teacher: tuple[Any] = (teacher,)  # in a tuple: not a submodule, so neither trained nor saved
        for layer in self.layers:
            self._check(layer)

    def _check(self, layer: int) -> None:
        mixers = [model.model.layers[layer].mixer for model in (self.student, *self.teacher)]
        for mixer in mixers:
            if type(mixer).mix_values is Mixer.mix_values:
                raise ZooError(f"layer {layer}: {type(mixer).__name__} has no matrix per head; leave stage matrix out")
        ours, theirs = (value_heads(mixer) for mixer in mixers)
        if ours != theirs:
            raise ZooError(f"layer {layer} has {ours} heads and the teacher {theirs}; their matrices must be as many")

    def forward(self, ids: Tensor) -> Tensor:
        seen = observe(self.teacher[0], self.layers, ids)
        return torch.stack([self.error(layer, seen[layer]) for layer in self.layers]).mean()

    def error(self, layer: int, seen: Seen) -> Tensor:
        with torch.no_grad(), torch.autocast(seen.x.device.type, enabled=False):
            target = mixing_matrix(self.teacher[0].model.layers[layer].mixer, seen.x, seen.ctx)
        return distance(mixing_matrix(self.student.model.layers[layer].mixer, seen.x, seen.ctx), target)


def distance(matrix: Tensor, target: Tensor) -> Tensor:
    """Mean squared Frobenius distance of matrices `[..., T, T]` of norm one."""
    ours, theirs = (x / x.flatten(-2).norm(dim=-1)[..., None, None].clamp(min=1e-12) for x in (matrix, target))
    return (ours - theirs).square().sum((-2, -1)).mean()
