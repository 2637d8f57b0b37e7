"""What methods share that choose keys for one query.

B batch, T new tokens, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from zoo.architectures.core.sparse import View
from zoo.kernels import checks

T = TypeVar("T")


def chooses(function: Callable[..., T]) -> Callable[..., T]:
    """For `function(self, view, ...)`: without gradients, and not in autocast's low precision."""

    @wraps(function)
    def chosen(self: Any, view: View, *args: Any) -> T:
        with torch.no_grad(), checks.autocast_off(view.q):
            return function(self, view, *args)

    return chosen


def lengths(view: View) -> Tensor:
    """`[B]`: keys of each row up to its last query's."""
    return (view.query_positions()[..., -1] + 1).expand(view.q.shape[0])


def follows(view: View, seen: int) -> bool:
    """Whether notes about `seen` keys lack the keys of this call at most; a static cache has all its keys always."""
    return view.k.shape[1] - seen in (0, view.q.shape[1])
