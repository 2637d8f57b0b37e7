"""The state of test_time_training: a tree of tensors, named like the paths of a cache.

    W1, b1 (W2, b2)      weights where the mini-batch began         [N, Hv, ...]
    gradient/W1, ..      sum of this mini-batch's gradients, A      [N, Hv, ...]
    momentum/W1, ..      with momentum: S                           [N, Hv, ...]
    retained             with decay: what is left of the weights, r [N, Hv]
    offset               tokens seen of this mini-batch             [N], int32

Shapes: N sequences, Hv value heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

WEIGHTS = {"linear": ("W1", "b1"), "mlp": ("W1", "b1", "W2", "b2")}
OFFSET = "offset"


def names(inner: str, momentum: bool, decay: bool) -> list[str]:
    """The float tensors of a state, in the order in which the backends carry them."""
    own = WEIGHTS[inner]
    found = [*own, *(f"gradient/{name}" for name in own)]
    if momentum:
        found += [f"momentum/{name}" for name in own]
    return [*found, "retained"] if decay else found


def test_time_training_state(
    weights: Mapping[str, Tensor],
    sequences: int,
    *,
    inner: str = "linear",
    momentum: bool = False,
    decay: bool = False,
) -> dict[str, Tensor]:
    """The state before the first token of `sequences` sequences; `momentum` and `decay` say whether the calls have
    them. A later step overwrites its tensors."""
    own = {name: weights[name].expand(sequences, *weights[name].shape).clone() for name in WEIGHTS[inner]}
    found = {}
    for name in names(inner, momentum, decay):
        found[name] = own[name] if name in own else torch.zeros_like(own[name.partition("/")[2] or "b1"])
    if decay:
        found["retained"] = torch.ones_like(own["b1"][..., 0])
    found[OFFSET] = torch.zeros(sequences, dtype=torch.int32, device=own["b1"].device)
    return found
