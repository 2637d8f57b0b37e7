"""SeerAttention (Gao et al. 2024, arXiv 2410.13276) and SeerAttention-R (2025, arXiv 2506.08889): learned gates choose.

    score = softmax_b(rope(W_q P_q(q)) . rope(W_k P_k(k)))       over blocks b that have ended before the query's own
    prefill gate:  P_q pools a block of queries, and each query head chooses
    decode gate:   no pooling of queries; W_q maps all heads of a KV head together, which choose together

P mixes pools (mean, max, min) of what q and k are before RoPE, which is applied anew to gate keys at the first position
of their blocks and to gate queries at their own. A query reads its own blocks always and, of the others, the best of a
budget or all whose score reaches `threshold`. Gates learn from the attention of the model itself, which stays as it is
(`zoo.conversion.core.seer_gates.train_gates`); with budget 1.0 attention is dense and they wait. The published gates
also score the query's own block, which is always read: here the score is that of the past alone.

B batch, T new tokens, R blocks of queries, M queries of a block, S keys, N blocks that ended, H query heads, G KV
heads, K head dimension, F pooled width, D gate width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys, all_tokens
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Output, grouped, wide
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan
from zoo.architectures.core.rope import RotaryTable, apply_rope
from zoo.architectures.core.routing import route
from zoo.architectures.core.sparse import PHASES, SparseArgs, SparseAttention, View, view_of
from zoo.architectures.core.windows import Windows, count, ended, entries, sequences, turns
from zoo.errors import ZooError
from zoo.kernels.block_sparse_attention.budget import BudgetSchedule

POOLS = ("mean", "max", "min")
SIZES = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "gate_dim": 8}
EXAMPLE = {**SIZES, "budget": 1.0}
VARIANTS = {
    "small": {**SIZES, "block": 16, "budget": 32, "trained": True},
    "threshold": {**SIZES, "block": 16, "threshold": 0.2, "trained": True, "q_pools": ("mean", "max"), "rope": None},
}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`block` tokens of a block, of queries and of keys; `gate_dim` D; `q_pools` and `k_pools` of mean, max and min.

    `gates` are the phases whose keys are chosen (prefill, decode). `threshold` takes the place of the budget. `trained`
    says that the gates have learned; without it they are not used.
    """

    block: int = 64
    gate_dim: int = 128
    q_pools: tuple[str, ...] = ("mean",)
    k_pools: tuple[str, ...] = ("max", "min", "mean")
    gates: tuple[str, ...] = PHASES
    threshold: float | None = None
    trained: bool = False
    budget: Any = 4096

    @property
    def block_size(self) -> int:
        return self.block

    @property
    def everything(self) -> bool:
        return self.threshold is None and super().everything

    def check_method(self) -> None:
        check_sizes(gate_dim=self.gate_dim)
        if not 16 <= self.block <= 128:
            raise ZooError(f"block was {self.block}; it must be 16 to 128")
        for name, known in (("q_pools", POOLS), ("k_pools", POOLS), ("gates", PHASES)):
            if not (value := getattr(self, name)) or set(value) - set(known) or len(set(value)) < len(value):
                raise ZooError(f"{name} was {value}; it must name some of {', '.join(known)}, each once")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ZooError(f"threshold was {self.threshold}; it must be a share above 0 and at most 1")
        super().check_method()


def pool(x: Tensor, known: Tensor | None, kinds: tuple[str, ...]) -> Tensor:
    """Blocks `[B, R, M, H, K]`, of which some tokens are `known [B, R, M]`, to `[B, R, H, F]`."""
    known = torch.ones_like(x[..., :1, :1], dtype=torch.bool) if known is None else known[..., None, None]
    pools = {
        "mean": lambda: x.masked_fill(~known, 0.0).sum(2) / known.sum(2).clamp(min=1),
        "max": lambda: x.masked_fill(~known, -torch.inf).amax(2).masked_fill(~known.any(2), 0.0),
        "min": lambda: x.masked_fill(~known, torch.inf).amin(2).masked_fill(~known.any(2), 0.0),
    }
    return torch.cat([pools[kind]() for kind in kinds], -1)


class Gate(nn.Module):
    """Maps of each head. They are buffers: what trains the model leaves them alone."""

    q_weight: Tensor
    k_weight: Tensor

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def reset(self) -> None:
        """Normal, so that a map keeps the size of what it maps."""
        for weight in (self.q_weight, self.k_weight):
            initialization.normal_(weight, mean=0.0, std=weight.shape[1] ** -0.5)


def gate_shapes(args: Args, phase: str) -> dict[str, tuple[int, ...]]:
    """`[heads, F, D]` of a gate's maps."""
    kv_heads = args.kv_heads or args.heads
    keys = (kv_heads, len(args.k_pools) * args.head_dim, args.gate_dim)
    if phase == "prefill":
        return {"q_weight": (args.heads, len(args.q_pools) * args.head_dim, args.gate_dim), "k_weight": keys}
    return {"q_weight": (kv_heads, args.heads // kv_heads * args.head_dim, args.gate_dim), "k_weight": keys}


class SeerAttention(SparseAttention):
    options = Args

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        self.gates = nn.ModuleDict({phase: Gate(gate_shapes(args, phase)) for phase in args.gates})
        self.learning = False  # attention is dense while the gates learn from it
        if args.rope is not None:
            rope = config.ropes[args.rope]
            share = args.gate_dim * rope.dim // args.head_dim // 2 * 2
            self.table = RotaryTable(replace(rope, dim=max(2, share)), config.max_position_embeddings)

    def make_rule(self, args: Any) -> Any:
        return View.dense

    def init_weights(self, std: float) -> None:
        for gate in self.gates.values():
            gate.reset()  # type: ignore[operator]

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        """Dense, until the gates have learned and a budget is set."""
        plan = super().from_attention(spec, heads)
        args, inits = {**plan.args, "budget": 1.0}, []
        for phase in (parsed := cls.parse({**args, **spec.wanted})).gates:
            for name, shape in gate_shapes(parsed, phase).items():
                options = {"std": shape[1] ** -0.5}
                inits.append(Init(target=f"gates.{phase}.{name}", shape=shape, kind="normal", options=options))
        return replace(plan, args=args, inits=tuple(inits))

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Output:
        if self.args.everything or self.learning:
            return super().forward(x, ctx, cache)
        if not self.args.trained:
            raise ValueError("the gates of seer_attention have not been trained; run train_gates, or set budget 1.0")
        if ctx.cu_seqlens is not None:
            return sequences(self.forward, x, ctx)
        (plain, gate), k = self.plain_queries(x), self.plain_keys(x)
        new = {"k": self.rotated(k, "k_norm", ctx), "v": grouped(self.v_proj(x), self.kv_heads)}
        seen, q_at, k_at = all_tokens(new, ctx, cache)
        keys = Keys(seen["k"], seen["v"], q_at, k_at, cache)
        view = view_of(self.rotated_queries(plain, ctx), keys, ctx, self.args.scale)
        found = ended({"gate_k": k}, ctx, cache, self.args.block, self.args.block)
        known = {name: entries(f"gate_{name}", self.gate_keys(name, found), found, ctx, cache) for name in self.gates}
        o = self._chosen(view, plain, known).flatten(-2)
        return self.o_proj(o if gate is None else o * torch.sigmoid(gate))

    def gate_keys(self, phase: str, found: Windows) -> Tensor:
        """Gate keys `[B, N, G, D]` of blocks."""
        pooled = pool(found.tokens["gate_k"], None, self.args.k_pools)
        positions = (found.index * self.args.block).expand(pooled.shape[:2])
        return self._mapped(pooled, self.gates[phase].k_weight, positions)  # type: ignore[arg-type]

    def gate_queries(self, phase: str, q: Tensor, at: Tensor, known: Tensor | None = None) -> Tensor:
        """Gate queries `[B, R, H or G, D]` of queries `[B, T, H, K]` before RoPE, at positions `at [B, T]`."""
        weight: Any = self.gates[phase].q_weight
        if phase == "decode":
            return self._mapped(q.unflatten(2, (self.kv_heads, -1)).flatten(3), weight, at)
        blocks, short = -(-q.shape[1] // self.args.block), -q.shape[1] % self.args.block
        known = torch.ones_like(at, dtype=torch.bool) if known is None else known
        known = F.pad(known, (0, short)).unflatten(1, (blocks, -1))
        padded = F.pad(q, (0, 0, 0, 0, 0, short)).unflatten(1, (blocks, -1))
        return self._mapped(pool(padded, known, self.args.q_pools), weight, at[:, :: self.args.block])

    def _mapped(self, x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        mapped = torch.einsum("brhf,hfd->brhd", x, weight.to(x.dtype))
        return mapped if self.args.rope is None else apply_rope(mapped, turns(self.table, positions), self.pairing)

    def gate_scores(self, q: Tensor, k: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Log scores `[B, H or G, R, N]` of gate queries at positions `at [B, R]`, and which blocks are past."""
        group = q.shape[2] // k.shape[2]
        scores = torch.einsum("brgxd,bngd->bgxrn", wide(q).unflatten(2, (-1, group)), wide(k)).flatten(1, 2)
        past = torch.arange(k.shape[1], device=k.device) < (at // self.args.block)[:, None, :, None]
        return (scores * self.args.gate_dim**-0.5).masked_fill(~past, -torch.inf).log_softmax(-1), past

    def _chosen(self, view: View, plain: Tensor, known: dict[str, Tensor]) -> Tensor:
        phase, args = "decode" if view.decoding else "prefill", self.args
        if phase not in known:
            return view.dense()
        size = 1 if view.decoding else args.block
        blocks, last = -(-view.k.shape[1] // args.block), torch.atleast_2d(view.query_positions())[:, -1:]

        def weigh(q: Tensor, at: Tensor) -> Tensor:
            scores, past = self.gate_scores(self.gate_queries(phase, q, at, at <= last), known[phase], at[:, ::size])
            weights = scores.exp().masked_fill(~past, 0.0)
            weights = F.pad(weights, (0, blocks - weights.shape[-1]))
            return weights if args.threshold is None else weights.masked_fill(weights < args.threshold, 0.0)

        # below the threshold weights are 0: all of the mass is in the blocks that reach it
        budget = args.schedule if args.threshold is None else BudgetSchedule(mass=1.0)
        sizes = dict(block=args.block, query_block=size, width=known[phase].shape[1])
        lists, counts = route(replace(view, q=plain), weigh, budget, **sizes)
        return view.attend(lists, counts, query_block=size, block=args.block)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        held = super().state_bytes(length, itemsize)
        if self.args.everything:
            return held
        size, args = self.args.block, self.args
        gates = len(args.gates) * count(length, size, size) * self.kv_heads * args.gate_dim
        return held + (gates + (size - 1) * self.kv_heads * self.head_dim) * itemsize


MODULE = SeerAttention
