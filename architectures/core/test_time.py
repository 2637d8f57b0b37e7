"""What mixers over the `test_time_training` op share: the inner model's weights over the cache.

B batch, T new tokens, N sequences, H heads, K and V head widths, F hidden width of the inner model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.cache_view import CacheView
from zoo.architectures.core.mixer import Context, along
from zoo.kernels.test_time_training import (
    test_time_training,
    test_time_training_state,
    test_time_training_step,
)

Tree = dict[str, Tensor]
OFFSET = "offset"
UNTOUCHED = -1  # the offset of a sequence that has not begun: its weights are the learned ones


@dataclass(frozen=True)
class Learner:
    """The inner model: its learned `weights` (`[H, ...]`, as the op names them), and the op's options."""

    weights: Mapping[str, Tensor]
    inner: Literal["linear", "mlp"]
    mini_batch: int
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    position_scale: Tensor | None = None
    forgets: bool = False  # with momentum and decay

    @property
    def options(self) -> dict[str, Any]:
        return dict(
            inner=self.inner,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            position_scale=self.position_scale,
            mini_batch=self.mini_batch,
        )

    def start(self, sequences: int) -> Tree:
        """The state before the first token."""
        has = dict(momentum=self.forgets, decay=self.forgets)
        return test_time_training_state(self.weights, sequences, inner=self.inner, **has)

    def stored(self, sequences: int, cache: LayerCache | CacheView) -> Tree:
        """The states in the cache as they lie there, made on first use."""
        found = {}
        for part in ("", "gradient/", "momentum/") if self.forgets else ("", "gradient/"):
            for name, weight in self.weights.items():
                shape = (sequences, *weight.shape)
                found[part + name] = cache.state(part + name, shape, weight.dtype, "recurrent", weight.device)
        first = next(iter(self.weights.values()))
        if self.forgets:
            shape = (sequences, first.shape[0])
            found["retained"] = cache.state("retained", shape, first.dtype, "recurrent", first.device, 1)
        shape = (sequences,)
        found[OFFSET] = cache.state(OFFSET, shape, torch.int32, "metadata", first.device, UNTOUCHED)
        return found

    def begun(self, stored: Tree) -> Tree:
        """The state that the op goes on from: where a sequence has not begun, the learned weights."""
        fresh = stored[OFFSET] < 0
        own = {
            name: torch.where(fresh.view(-1, *[1] * weight.dim()), weight, stored[name])
            for name, weight in self.weights.items()
        }
        return {**stored, **own, OFFSET: stored[OFFSET].clamp(min=0)}

    def run(self, tokens: Mapping[str, Tensor], state: Tree, mask: Tensor | None) -> tuple[Tensor, Tree]:
        """Outputs `[B, T, H, V]` and the next state; tokens that `mask [B, T]` leaves out do not count."""
        rows = None if mask is None else Rows(mask)
        call: dict[str, Any] = dict(weights=self.weights, output_final_state=True, **self.options)
        if rows is None:
            call |= dict(initial_state=state, **tokens)
        else:
            call |= {name: rows.pack(x) for name, x in tokens.items()}
            call |= dict(initial_state=rows.twice(state), cu_seqlens=rows.bounds)
        o, new = test_time_training(**call)
        assert new is not None
        return (o, new) if rows is None else (rows.unpack(o), rows.once(new))


class Rows:
    """Batched rows as packed sequences: of each row the tokens that `mask [B, T]` takes, then, as a sequence of its
    own, the others. So a row's tokens keep their places in its mini-batches, wherever its padding lies."""

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        self.order = (~mask).int().argsort(dim=1, stable=True)
        starts = torch.arange(mask.shape[0], device=mask.device) * mask.shape[1]
        bounds = torch.stack([starts, starts + mask.sum(1)], dim=1).flatten()
        self.bounds = torch.cat([bounds, bounds.new_full((1,), mask.numel())]).to(torch.int32)

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...] -> [1, B T, ...]`."""
        return along(x, self.order).flatten(0, 1)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """`[1, B T, ...] -> [B, T, ...]`."""
        return along(x[0].unflatten(0, self.shape), self.order.argsort(dim=1))

    @staticmethod
    def twice(state: Tree) -> Tree:
        """A row's state for both of its sequences."""
        return {name: x.repeat_interleave(2, dim=0) for name, x in state.items()}

    @staticmethod
    def once(state: Tree) -> Tree:
        """The states of the rows' tokens."""
        return {name: x[::2] for name, x in state.items()}


def learn(learner: Learner, tokens: Mapping[str, Tensor], ctx: Context, cache: LayerCache | CacheView | None) -> Tensor:
    """`test_time_training` of `tokens`: `q, k [B, T, H, K]`, `v [B, T, H, V]`, `lr [B, T, H]`, and `momentum` and
    `decay` `[B, T, H]` if the learner forgets; the cache's states are continued and kept. `[B, T, H, V]`."""
    rows = tokens["q"].shape[0]
    call: dict[str, Any] = dict(weights=learner.weights, **tokens, **learner.options)
    if cache is None and ctx.padding_mask is None:
        return test_time_training(**call, cu_seqlens=ctx.cu_seqlens)[0]
    if cache is None:
        return learner.run(tokens, learner.start(rows), ctx.padding_mask)[0]
    stored = learner.stored(rows, cache)
    single = ctx.phase == "decode" and tokens["q"].shape[1] == 1 and ctx.padding_mask is None
    if single and not torch.is_grad_enabled():
        for name, value in learner.begun(stored).items():
            if value is not stored[name]:
                stored[name].copy_(value)
        return test_time_training_step(**call, state=stored)
    o, new = learner.run(tokens, learner.begun(stored), ctx.padding_mask)
    keep(new, cache)
    return o


def keep(new: Tree, cache: LayerCache | CacheView) -> None:
    """Store the state after a call."""
    for name, value in new.items():
        cache.put(name, value, "metadata" if name == OFFSET else "recurrent")
