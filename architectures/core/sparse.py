"""Softmax attention over keys that are chosen while the model runs, and what its methods share.

A method takes the place of dense attention in prefill (several queries), in decode (one query beside cached keys) or in
both. It adds no parameters, so that it also runs inside a model that was not made for it.

B batch, T new tokens, S keys, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.architectures.core import mixer
from zoo.architectures.core.cache import UNSEEN, LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.plan import AttentionSpec, MixerPlan
from zoo.architectures.core.softmax import SoftmaxArgs, SoftmaxAttention, attention_rows
from zoo.errors import ZooError
from zoo.kernels import checks
from zoo.kernels.attention import attention
from zoo.kernels.block_sparse_attention import block_sparse_attention
from zoo.kernels.block_sparse_attention.budget import BudgetSchedule
from zoo.kernels.block_sparse_attention.select import select_blocks

Budget = float | int | Mapping[str, Any]
PHASES = ("prefill", "decode")


def schedule(budget: Budget, block: int) -> BudgetSchedule:
    """A user's budget in blocks: an integer is a number of tokens, a float a fraction of the blocks, and a mapping
    holds the arguments of `BudgetSchedule` itself."""
    if isinstance(budget, Mapping):
        return BudgetSchedule(**budget)
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or budget <= 0:
        raise ZooError(f"budget was {budget!r}; it must be tokens (an integer above 0), a fraction, or a mapping")
    if isinstance(budget, int):
        return BudgetSchedule(fixed=math.ceil(budget / block))
    return BudgetSchedule(fraction=budget)


@dataclass(frozen=True)
class View:
    """What a method sees of one call of one layer.

    Args:
        q: `[B, T, H, K]`; k, v: `[B, S, G, K]`, all keys, the new ones last (in a static cache unwritten ones behind).
        decoding: one new token beside cached ones.
        q_positions: `[B, T]`, consecutive, negative on left padding; None: the last T of the keys'.
        starts: `[B]`, keys of padding before the first token of each row; None: no padding.
        notes: what the method remembers about the cached keys; empty again whenever the cache changed in any way but by
            growing. None without a cache.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decoding: bool = False
    q_positions: Tensor | None = None
    starts: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float | None = None
    notes: dict[str, Any] | None = None

    @property
    def places(self) -> dict[str, Any]:
        """Where queries and keys lie, as arguments of the sparse ops."""
        return dict(q_positions=self.q_positions, starts=self.starts, cu_seqlens=self.cu_seqlens)

    @property
    def factor(self) -> float:
        """The factor on scores."""
        return checks.default_scale(self.scale, self.q)

    def attend(self, blocks: Tensor, counts: Tensor | None = None, **options: Any) -> Tensor:
        """`block_sparse_attention` of this call, `[B, T, H, V]`."""
        return self.attend_lse(blocks, counts, **options)[0]

    def attend_lse(self, blocks: Tensor, counts: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """`attend`, and the log of the softmax's denominator `[B, T, H]`."""
        call = dict(scale=self.scale, return_lse=True, **self.places, **options)
        o, lse = block_sparse_attention(self.q, self.k, self.v, blocks, counts, **call)
        return o, lse

    def select(self, budget: BudgetSchedule, **options: Any) -> tuple[Tensor, Tensor]:
        """`select_blocks` for the queries of this call."""
        return select_blocks(self.q, self.k, budget, scale=self.scale, **self.places, **options)

    def dense(self, **options: Any) -> Tensor:
        """Attention to all tokens so far, `[B, T, H, V]`; `options` are those of the op `attention`."""
        places: dict[str, Any] = dict(cu_seqlens=self.cu_seqlens)
        if self.starts is not None or self.q_positions is not None:
            places |= dict(q_positions=self.query_positions(), k_positions=self.key_positions())
        o: Tensor = attention(self.q, self.k, self.v, causal=True, scale=self.scale, **places, **options)
        return o

    def query_positions(self) -> Tensor:
        """`[B, T]` or `[T]`: position of each query in its own sequence, negative on left padding."""
        if self.q_positions is not None:
            return self.q_positions
        tokens, keys = self.q.shape[1], self.k.shape[1]
        positions = torch.arange(keys - tokens, keys, device=self.q.device)
        return positions if self.starts is None else positions - self.starts[:, None]

    def key_positions(self) -> Tensor:
        """`[B, S]` or `[S]`: position of each key in its own sequence, one that no query sees on left padding."""
        positions = torch.arange(self.k.shape[1], device=self.k.device)
        if self.starts is None:
            return positions
        positions = positions - self.starts[:, None]
        return torch.where(positions < 0, UNSEEN, positions)


class Method:
    """A rule that chooses keys, in the phases that it names; in the others attention is dense."""

    phases: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = ""

    def __init__(self, args: Any) -> None:
        self.args = args

    def __call__(self, view: View) -> Tensor:
        phase = "decode" if view.decoding else "prefill"
        if phase not in self.phases:
            self.observe(view)
            return view.dense()
        return self.decode(view) if view.decoding else self.prefill(view)

    def observe(self, view: View) -> None:
        """Called with every call that is not this method's to answer: what it notes must follow the cache."""

    def prefill(self, view: View) -> Tensor:
        """`[B, T, H, K]` for several queries."""
        raise ZooError(f"method {self.name!r} chooses keys for {' and '.join(self.phases)} alone, not for prefill")

    def decode(self, view: View) -> Tensor:
        """`[B, 1, H, K]` for one query."""
        raise ZooError(f"method {self.name!r} chooses keys for {' and '.join(self.phases)} alone, not for decode")


@dataclass(frozen=True, kw_only=True)
class SparseArgs(SoftmaxArgs):
    """The options of queries, keys and values, and how much attention reads.

    `budget`: tokens (an integer), a fraction of what there is (a float), or a mapping of `BudgetSchedule`'s arguments.
    """

    budget: Any = 0.25

    @property
    def block_size(self) -> int:
        """Tokens of a key block, for budgets in tokens."""
        return 1

    @property
    def schedule(self) -> BudgetSchedule:
        """The budget in blocks."""
        return schedule(self.budget, self.block_size)

    @property
    def everything(self) -> bool:
        """Whether the budget holds all keys, so that attention is dense."""
        return isinstance(self.budget, float) and self.budget == 1.0

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        self.check_method()

    def check_method(self) -> None:
        """Raise `ZooError` where an option of the method is wrong."""
        if self.softcap is not None:
            raise ZooError(f"softcap was {self.softcap}; attention over chosen keys has none")
        try:
            _ = self.schedule
        except (TypeError, ValueError) as error:
            raise ZooError(str(error)) from None


def keep_projections(options: type[mixer.Args], spec: AttentionSpec, heads: tuple[int, ...] | None) -> MixerPlan:
    """The plan of a mixer with attention's projections and those of its options that `options` has too.

    Raises:
        ZooError: attention has an option that the mixer has not.
    """
    if heads is not None:
        raise ZooError("sparse attention keeps all heads of a layer; heads cannot be chosen")
    known = {option.name for option in fields(options)}
    if unmet := [name for name, value in spec.args.items() if value and name not in known]:
        raise ZooError(f"attention has {unmet[0]}, which attention over chosen keys cannot take over; keep it")
    args = {name: value for name, value in spec.args.items() if name in known}
    return MixerPlan(args=args, rows=attention_rows(spec), inits=())


class SparseAttention(SoftmaxAttention):
    """A mixer whose attention is `method`'s."""

    options: ClassVar[type[mixer.Args]] = SparseArgs
    keeps_softmax = True
    bidirectional = False
    method: ClassVar[type[Method]]

    def __init__(self, config: DecoderConfig, args: Any) -> None:
        super().__init__(config, args)
        self.rule = self.make_rule(args)

    def make_rule(self, args: Any) -> Any:
        """What is called with each `View`."""
        return self.method(args)

    @property
    def phase_consistent(self) -> bool:  # type: ignore[override]
        """Prefill and decode read the same keys only where both read all."""
        return bool(self.args.everything)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        return keep_projections(cls.options, spec, heads)

    def visible(self, x: Tensor, ctx: Context, cache: LayerCache | None) -> Keys:
        return super().visible(x, ctx, cache)._replace(cache=cache)

    def attend(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        o: Tensor = self.rule(view_of(q, keys, ctx, self.args.scale))
        return o


def view_of(q: Tensor, keys: Keys, ctx: Context, scale: float | None) -> View:
    """The call of a layer of ours as a method sees it. The padding of one call must lie on one side."""
    (k, v, places, at, cache), tokens = keys, q.shape[1]
    call: dict[str, Any] = dict(
        decoding=ctx.phase == "decode" and tokens == 1,
        cu_seqlens=ctx.cu_seqlens,
        scale=scale,
        notes=None if cache is None else cache.notes,
    )
    if at is None or places is None:
        return View(q, k, v, **call)
    if ctx.padding_mask is not None:  # count from the first real token, as padding has no position of its own
        first = ctx.padding_mask.int().argmax(1, keepdim=True)
        places = places.gather(1, first) - first + torch.arange(tokens, device=q.device)
    if cache is not None and cache.gaps:  # move the keys together: each to the place of its position
        order = at.sort(dim=1, stable=True).indices[..., None, None]
        k, v = k.gather(1, order.expand_as(k)), v.gather(1, order.expand_as(v))
        return View(q, k, v, q_positions=places, **call | {"notes": None})
    return View(q, k, v, q_positions=places, starts=(at < UNSEEN).int().argmax(1), **call)
