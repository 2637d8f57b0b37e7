"""Two mixers side by side on one input (Falcon-H1, arXiv 2507.22448; Hymba, Dong et al. 2024, arXiv 2411.13676).

    y = a_out first(a_in x) + b_out second(b_in x)

Hymba normalises both outputs and takes their mean, before one common output projection: with N1 and N2 RMS norms,
`y = (a_out N1(first(x)) + b_out N2(second(x))) / 2 W_out`.

B batch, T new tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context, Mixer, Output
from zoo.architectures.core.norms import RMSNorm
from zoo.errors import ZooError

EXAMPLE: dict[str, Any] = {
    "first": "attention",
    "first_args": {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"},
    "second": "mamba2",
    "second_args": {"heads": 4, "head_dim": 16, "state_dim": 12},
    "first_out": 0.7,
    "second_in": 1.3,
}
VARIANTS = {"joint": {**EXAMPLE, "norms": True, "average": True, "joint": True}}
BRANCHES = ("first", "second")
FLAGS = ("packed", "rollback", "phase_consistent")


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`first` and `second` name mixers, each with its arguments; `*_in` and `*_out` scale their inputs and outputs.

    `norms` puts an RMS norm on each output, `average` halves their sum. `joint` replaces the two output projections by
    one of the sum, so that both mixers must be equally wide before it.
    """

    first: str
    second: str
    first_args: Mapping[str, Any] = field(default_factory=dict)
    second_args: Mapping[str, Any] = field(default_factory=dict)
    first_in: float = 1.0
    second_in: float = 1.0
    first_out: float = 1.0
    second_out: float = 1.0
    norms: bool = False
    average: bool = False
    joint: bool = False

    def branches(self) -> list[tuple[type[Mixer], Any]]:
        """Class and typed arguments of the two mixers."""
        classes = [registry.get("mixers", getattr(self, name), "MODULE") for name in BRANCHES]
        given = [getattr(self, f"{name}_args") for name in BRANCHES]
        return [(cls, cls.parse(args)) for cls, args in zip(classes, given, strict=True)]

    def check(self, config: DecoderConfig) -> None:
        for name, (cls, args) in zip(BRANCHES, self.branches(), strict=True):
            args.check(config)
            if cls.encoder_only:
                raise ZooError(f"{name} was {getattr(self, name)!r}, which sees tokens to come; it cannot run beside")
        if self.joint:
            with torch.device("meta"):
                Parallel(config, self)


class Parallel(Mixer):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args = args
        branches = [cls(config, parsed) for cls, parsed in args.branches()]
        width = config.hidden_size
        if args.joint:
            widths = [take_projection(branch) for branch in branches]
            if widths[0] != widths[1]:
                raise ZooError(f"joint was given for mixers of widths {widths[0]} and {widths[1]}; they must be equal")
            width = widths[0]
            self.out_proj = nn.Linear(width, config.hidden_size, bias=False)
        for name, branch in zip(BRANCHES, branches, strict=True):
            self.add_module(name, branch)
            if args.norms:
                self.add_module(f"{name}_norm", RMSNorm(width, config.norm.eps))
        for flag in FLAGS:
            setattr(self, flag, all(getattr(branch, flag) for branch in branches))

    @classmethod
    def parse(cls, args: Mapping[str, Any]) -> Args:
        """Typed arguments, those of the two mixers spelled out."""
        made: Args = super().parse(args)
        parsed = {f"{name}_args": typed for name, (_, typed) in zip(BRANCHES, made.branches(), strict=True)}
        spelled = {name: {f.name: getattr(a, f.name) for f in fields(a)} for name, a in parsed.items()}
        return Args(**{**vars(made), **spelled})

    @classmethod
    def reads_of(cls, args: Args) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part, parsed in args.branches() for name in part.reads_of(parsed)))

    @classmethod
    def writes_of(cls, args: Args) -> tuple[str, ...]:
        return tuple(name for part, parsed in args.branches() for name in part.writes_of(parsed))

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        """Attention beside Mamba-2, each as it would be alone."""
        names = {"first": "attention", "second": "mamba2"}
        parts = {name: registry.get("mixers", mixer, "MODULE") for name, mixer in names.items()}
        return names | {f"{name}_args": part.default_args(hidden_size, heads) for name, part in parts.items()}

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Output:
        """`x [B, T, D] -> [B, T, D]`; the states are nested under `first/` and `second/`."""
        written: dict[str, Tensor] = {}
        first, second = (self._branch(name, x, ctx, cache, written) for name in BRANCHES)
        y = first + second
        if self.args.average:
            y = y / 2
        if self.args.joint:
            y = self.out_proj(y)
        return (y, written) if written else y

    def _branch(
        self, name: str, x: Tensor, ctx: Context, cache: LayerCache | None, written: dict[str, Tensor]
    ) -> Tensor:
        scale_in, scale_out = (getattr(self.args, f"{name}_{side}") for side in ("in", "out"))
        view = None if cache is None else cache.view(name)
        out = self.get_submodule(name)(x if scale_in == 1.0 else x * scale_in, ctx, view)
        if isinstance(out, tuple):
            out, more = out
            written.update(more)
        if self.args.norms:
            out = self.get_submodule(f"{name}_norm")(out)
        return out if scale_out == 1.0 else out * scale_out

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return sum(cast(Mixer, self.get_submodule(name)).state_bytes(length, itemsize) for name in BRANCHES)


def take_projection(branch: nn.Module) -> int:
    """Remove a mixer's output projection; the width of what it had for input.

    Raises:
        ZooError: a mixer without one.
    """
    for name in ("o_proj", "out_proj"):
        if isinstance(projection := getattr(branch, name, None), nn.Linear):
            setattr(branch, name, nn.Identity())
            return projection.in_features
    raise ZooError(f"joint was given, but {type(branch).__name__} has no output projection")


MODULE = Parallel
