"""MInference: prefill by one of three patterns per head, found offline (Jiang et al. 2024, arXiv 2407.02490).

    a_shape         the first tokens and the nearest ones
    vertical_slash  the keys and the distances that the newest 64 queries attend to most
    block           for each block of queries the blocks of keys of the largest scale mean(q) . mean(k)

The first keys count among the verticals, and the nearest distances among the slashes, whatever their weight. A slash, a
diagonal of width 1, is widened to the blocks that it crosses, and the budget counts these; verticals are single keys.
Own blocks are read always. Decode is dense.

B batch, T new tokens, S keys, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.block_lists import by_sequence, check_block, span_of
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.sparse import Method, SparseArgs, SparseAttention, View
from zoo.architectures.core.stripes import Pattern, Stripes, ranks, read, stripes
from zoo.errors import ZooError

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "block": 16, "budget": 1.0}
MIXED = (("a_shape", 0.1), ("vertical_slash", 0.5), ("block", 0.0), ("vertical_slash", 0.2))
VARIANTS = {
    "mixed": {**EXAMPLE, "patterns": MIXED},
    "small": {**EXAMPLE, "budget": 32, "patterns": MIXED},
    "mass": {**EXAMPLE, "budget": {"mass": 0.8}, "patterns": MIXED},
}
KINDS = ("a_shape", "vertical_slash", "block")
USUAL = ("vertical_slash", 0.25)
GRID = (("a_shape", 0.1), *(("vertical_slash", share) for share in (0.1, 0.25, 0.5, 0.75)), ("block", 0.0))


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`patterns`: of each query head (kind, share), its kind and the share of the last queries' budget that goes to
    first keys or verticals; None: all are vertical_slash. `last` queries tell verticals and slashes, among which the
    first `near` keys and nearest `near` distances always are. `block` tokens of a block, 1 or 16 to 128."""

    block: int = 64
    patterns: tuple[tuple[str, float], ...] | None = None
    last: int = 64
    near: int = 30

    @property
    def block_size(self) -> int:
        return self.block

    def check_method(self) -> None:
        check_block("block", self.block)
        check_sizes(last=self.last)
        if not isinstance(self.near, int) or self.near < 0:
            raise ZooError(f"near was {self.near!r}; it must be at least 0")
        if self.patterns is not None:
            if len(self.patterns) != self.heads:
                raise ZooError(f"patterns had {len(self.patterns)}; it must have one for each of {self.heads} heads")
            for pattern in self.patterns:
                check_pattern(pattern)
        super().check_method()


def check_pattern(pattern: Any) -> None:
    if len(pattern) != 2 or pattern[0] not in KINDS or not 0 <= pattern[1] < 1:
        kinds = ", ".join(KINDS)
        raise ZooError(f"patterns had {pattern!r}; each must be (kind, share), of {kinds}, and a share of 0 to below 1")


class MInference(Method):
    phases = ("prefill",)
    name = "minference"

    def prefill(self, view: View) -> Tensor:
        return by_sequence(self.read, view)

    def read(self, view: View) -> Tensor:
        """`[B, T, H, V]` of sequences that are not packed."""
        args = self.args
        with torch.no_grad():
            pattern = self.pattern(stripes(view, span_of(view), args.last))
        return read(view, pattern, args.schedule, args.block)

    def pattern(self, mass: Stripes) -> Pattern:
        """What each head reads, by the attention weights `[B, H, S]` of keys and of distances."""
        device = mass.slash.device
        patterns = self.args.patterns or (USUAL,) * mass.slash.shape[1]
        kinds = torch.tensor([[KINDS.index(kind) for kind, _ in patterns]], device=device)
        shares = [[0.0 if kind == "block" else share for kind, share in patterns]]
        near_first = ranks(-torch.arange(mass.slash.shape[2], device=device, dtype=mass.slash.dtype))
        order = []
        for x in mass:
            forced = torch.cat([torch.full_like(x[..., : self.args.near], torch.inf), x[..., self.args.near :]], -1)
            order.append(torch.where((kinds == KINDS.index("a_shape"))[..., None], near_first, ranks(forced)))
        pooled = kinds == KINDS.index("block") if "block" in dict(patterns) else None
        return Pattern(mass, Stripes(*order), torch.tensor(shares, dtype=torch.float64, device=device), pooled)


def calibrate(view: View, args: Args) -> dict[str, Any]:
    """The pattern of each head, of a few that cost the same, whose output is nearest to dense attention's."""
    dense, errors = view.dense(), []
    for pattern in GRID:
        method = MInference(replace(args, patterns=(pattern,) * view.q.shape[2]))
        errors.append((method(view) - dense).double().square().sum((0, 1, 3)))
    best = torch.stack(errors).argmin(0).tolist()
    return {"patterns": [list(GRID[i]) for i in best]}


class MInferenceAttention(SparseAttention):
    options = Args
    method = MInference


MODULE = MInferenceAttention
