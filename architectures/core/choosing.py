"""What methods share that choose keys: notes that follow the cache, and work in slices.

B batch, T new tokens, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from zoo.architectures.core.sparse import View
from zoo.kernels import checks

LIMIT = 1 << 24  # numbers computed at a time
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


def follows(view: View, seen: int, noted: Tensor) -> bool:
    """Whether what was `noted` about `seen` keys lacks the keys of this call at most, and may be written: a static
    cache has all its keys always, and a tensor made in inference mode may be written only there."""
    lacking = view.k.shape[1] - seen in (0, view.q.shape[1])
    return lacking and (torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not noted.is_inference())


def widened(x: Tensor, count: int) -> Tensor:
    """`x [B, n, ...]` with zeros behind it, up to `count` along n."""
    missing = count - x.shape[1]
    return x if missing <= 0 else torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)


def slices(length: int, each: int, unit: int = 1) -> Iterator[slice]:
    """Pieces of an axis of `length`, whole units of it, each of which costs `each` numbers."""
    step = unit * max(1, LIMIT // max(each, 1))
    return (slice(begin, min(begin + step, length)) for begin in range(0, length, step))
