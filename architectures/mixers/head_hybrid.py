"""Softmax heads beside heads of another mixer, on one input and before one output projection: a few heads that look
things up are kept, the others converted (Retrieval-aware distillation, arXiv 2602.11374).

    y = W_o [softmax heads(x), other heads(x)]

B batch, T new tokens, H heads, K head dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.architectures.core import mixer
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context, Mixer
from zoo.architectures.core.plan import AttentionSpec, MixerPlan, Row, Start
from zoo.architectures.core.recurrent import transferred_rows
from zoo.architectures.mixers.parallel import take_projection
from zoo.errors import ZooError

EXAMPLE: dict[str, Any] = {
    "attention": {"heads": 2, "head_dim": 16, "kv_heads": 1, "rope": "default"},
    "mixer": "mamba2",
    "mixer_args": {"heads": 3, "head_dim": 16, "state_dim": 12},
    "o_bias": True,
}
BRANCHES = ("softmax", "other")
FLAGS = ("packed", "rollback", "phase_consistent")


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`attention` are the arguments of the softmax heads, `mixer` and `mixer_args` name the mixer of the others; output
    projections of their own they have none. `kept` are the softmax heads as the source of a conversion counted them."""

    mixer: str
    attention: Mapping[str, Any] = field(default_factory=dict)
    mixer_args: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[int, ...] = ()
    o_bias: bool = False

    def branches(self) -> list[tuple[type[Mixer], Any]]:
        """Class and typed arguments of the softmax heads and of the others."""
        given = (("attention", self.attention), (self.mixer, self.mixer_args))
        classes = [(registry.get("mixers", name, "MODULE"), args) for name, args in given]
        return [(cls, cls.parse(args)) for cls, args in classes]

    def check(self, config: DecoderConfig) -> None:
        for cls, args in self.branches():
            args.check(config)
            if cls.encoder_only or cls.reads_of(args) or cls.writes_of(args):
                raise ZooError(f"mixer was {self.mixer!r}, which needs a layer of its own; it cannot run beside")
        with torch.device("meta"):
            HeadHybrid(config, self)


class HeadHybrid(Mixer):
    options = Args
    by_head = False

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        width = 0
        for name, (cls, parsed) in zip(BRANCHES, args.branches(), strict=True):
            branch = cls(config, parsed)
            width += take_projection(branch)
            self.add_module(name, branch)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=args.o_bias)
        for flag in FLAGS:
            setattr(self, flag, all(getattr(branch, flag) for branch in self._branches()))

    def _branches(self) -> list[Mixer]:
        return [cast(Mixer, self.get_submodule(name)) for name in BRANCHES]

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        """One softmax head, the others of `gated_delta_net`."""
        size = hidden_size // heads
        attention = {"heads": 1, "head_dim": size, "rope": "default"}
        return {
            "attention": attention,
            "mixer": "gated_delta_net",
            "mixer_args": {"heads": max(1, heads - 1), "head_dim": size},
        }

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        """`spec.wanted` says which heads are `kept` (default: the first), which `mixer` (gated_delta_net) takes the
        others over, and with which `mixer_args`."""
        if heads is not None:
            raise ZooError("mixer 'head_hybrid' takes all heads of a layer; heads cannot be chosen")
        name, kept = (
            str(spec.wanted.get("mixer", "gated_delta_net")),
            checked(spec.wanted.get("kept", (0,)), spec.heads),
        )
        rest = tuple(head for head in range(spec.heads) if head not in kept)
        inner = replace(spec, o_bias=False, wanted=spec.wanted.get("mixer_args", {}))
        softmax, other = softmax_heads(inner, kept), registry.get("mixers", name, "MODULE").from_attention(inner, rest)
        rows = [
            replace(row, target=f"{branch}.{row.target}")
            for branch, plan in zip(BRANCHES, (softmax, other), strict=True)
            for row in plan.rows
            if not row.source.startswith("o_proj.")
        ]
        columns = {"heads": [*kept, *rest], "head_dim": spec.head_dim, "dim": 1}
        rows.append(Row(source="o_proj.weight", target="o_proj.weight", operation="select_heads", options=columns))
        rows += [Row(source="o_proj.bias", target="o_proj.bias")] if spec.o_bias else []
        args = {"kept": kept, "o_bias": spec.o_bias, "attention": softmax.args, "mixer": name, "mixer_args": other.args}
        inits = tuple(replace(init, target=f"{BRANCHES[1]}.{init.target}") for init in other.inits)
        return MixerPlan(args=args, rows=tuple(rows), inits=inits)

    @classmethod
    def starts_of(cls, args: Args) -> tuple[Start, ...]:
        """Those of the other heads' mixer, for the heads that are not `kept`."""
        inner, parsed = args.branches()[1]
        rest = [head for head in range(len(args.kept) + parsed.heads) if head not in args.kept]

        def inside(start: Start) -> Start:
            return replace(
                start,
                target=f"{BRANCHES[1]}.{start.target}",
                form=lambda values, _: start.form(values[rest], parsed),
            )

        return tuple(inside(start) for start in inner.starts_of(parsed))

    def expanded_qkv(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """As for other mixers, with the kept heads first."""
        parts = [branch.expanded_qkv(x, ctx) for branch in self._branches()]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        return q, k, v

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`; the states are nested under `softmax/` and `other/`."""
        views = [None if cache is None else cache.view(name) for name in BRANCHES]
        parts = [branch(x, ctx, view) for branch, view in zip(self._branches(), views, strict=True)]
        return self.o_proj(torch.cat(parts, dim=-1))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return sum(branch.state_bytes(length, itemsize) for branch in self._branches())


def checked(kept: Sequence[int], heads: int) -> tuple[int, ...]:
    """The heads to keep, in order.

    Raises:
        ZooError: heads that do not exist or are named twice, none, or all of them.
    """
    wrong = [head for head in kept if type(head) is not int or not 0 <= head < heads]
    if wrong or len(set(kept)) != len(kept):
        raise ZooError(f"kept heads were {list(kept)}; each must be one of 0 to {heads - 1}, named once")
    if not 0 < len(kept) < heads:
        raise ZooError(f"kept heads were {len(kept)} of {heads}; keep some, or keep or convert the layer whole")
    return tuple(sorted(kept))


def softmax_heads(spec: AttentionSpec, heads: tuple[int, ...]) -> MixerPlan:
    """Softmax attention with the given heads alone; KV heads stay shared where as many of the heads read each."""
    shared = Counter(head // spec.group for head in heads)
    kv_heads = list(shared) if len(set(shared.values())) == 1 else [head // spec.group for head in heads]
    keys = {"heads": kv_heads, "head_dim": spec.head_dim}
    rows = tuple(
        replace(row, options=keys) if row.source.startswith(("k_proj.", "v_proj.")) else row
        for row in transferred_rows(spec, heads)
    )
    sizes = {"heads": len(heads), "kv_heads": len(kv_heads), "o_bias": False}
    return MixerPlan(args={**spec.args, **sizes}, rows=rows, inits=())


MODULE = HeadHybrid
