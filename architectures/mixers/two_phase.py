"""Two methods over one cache: one chooses keys in prefill, for many queries at once, another in decode, for one.

Either may be left out: its phase is then dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.methods import COMMON, Phases, mixer_of
from zoo.architectures.core.softmax import SoftmaxArgs
from zoo.architectures.core.sparse import PHASES, SparseAttention
from zoo.errors import ZooError

EXAMPLE = {
    **{"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"},
    **{"prefill": None, "decode": {"mixer": "quest", "page": 16, "budget": 1.0}},
}
VARIANTS = {"small": {**EXAMPLE, "decode": {"mixer": "quest", "page": 16, "budget": 32}}}


@dataclass(frozen=True, kw_only=True)
class Args(SoftmaxArgs):
    """`prefill` and `decode`: the mixer that chooses in that phase as "mixer", and its own options."""

    prefill: Mapping[str, Any] | None = None
    decode: Mapping[str, Any] | None = None

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        for phase in PHASES:
            if (part := self.part(phase)) is None:
                continue
            cls, args = part
            args.check(config)
            if phase not in cls.method.phases:
                raise ZooError(f"{phase} was {getattr(self, phase)['mixer']!r}, which does not choose keys in {phase}")

    def part(self, phase: str) -> tuple[Any, Any] | None:
        """The mixer class of a phase and its typed arguments."""
        options = dict(getattr(self, phase) or {})
        if not options:
            return None
        if "mixer" not in options:
            raise ZooError(f"{phase} was {options}; it must name a method as 'mixer'")
        cls = mixer_of(options.pop("mixer"))
        shared = {option.name: getattr(self, option.name) for option in fields(SoftmaxArgs)}
        if taken := sorted(COMMON & set(options)):
            raise ZooError(f"{phase} has {taken[0]!r}, which both phases share; give it beside them")
        return cls, cls.parse({**shared, **options})

    @property
    def everything(self) -> bool:
        """Whether attention is dense in both phases."""
        return all(part is None or part[1].everything for part in map(self.part, PHASES))


class TwoPhase(SparseAttention):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        with torch.device("meta"):  # they tell what they note; in a tuple, so that their weights are not the model's
            self.parts = tuple(cls(config, made) for cls, made in filter(None, map(args.part, PHASES)))

    def make_rule(self, args: Args) -> Phases:
        return Phases(*(None if part is None else part[0].method(part[1]) for part in map(args.part, PHASES)))

    @property
    def rectified_every(self) -> int:
        """After how many decoded tokens these are to be rectified (`core/rectify.py`); 0: never."""
        return max((getattr(part, "rectified_every", 0) for part in self.parts), default=0)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        keys = super().state_bytes(length, itemsize)
        return keys + sum(part.state_bytes(length, itemsize) - keys for part in self.parts)


MODULE = TwoPhase
