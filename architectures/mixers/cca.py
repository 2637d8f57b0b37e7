"""Core context aware attention (CCA, Chen et al. 2024, arXiv 2412.12465): far tokens are read as one per group.

    c_m = sum over group m of softmax_j(scale q_last . k_j) (k_j, v_j)       q_last the query of the group's last token
    o_i = softmax(q_i [K_core, K_local]^T) [V_core, V_local]                 one softmax over both

Groups of g tokens that end at least s tokens before i, i counted, are read as their core tokens; all later tokens, s to
s + g - 1 of them, as they are: every token so far in exactly one way. Keys are pooled before RoPE, which turns a core
key to the position of its group's last token; each query head pools by its own query. No parameters are new. Prefill
and decode are the same function, and the cache holds O(length / g + s).

B batch, T new tokens, C tokens of a group, M new groups, H query heads, G KV heads, K and V head dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys, all_tokens, recent_tokens
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import Context, Output, grouped, wide
from zoo.architectures.core.plan import AttentionSpec, MixerPlan
from zoo.architectures.core.rope import RotaryTable
from zoo.architectures.core.softmax import SoftmaxArgs, SoftmaxAttention, known_positions, merge
from zoo.architectures.core.sparse import keep_projections
from zoo.architectures.core.windows import attend_entries, count, ended, entries, sequences
from zoo.errors import ZooError
from zoo.kernels import checks
from zoo.kernels.attention import attention

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "group": 3, "window": 4}
VARIANTS = {"wide": {**EXAMPLE, "window": 1, "group": 2, "qk_norm": "rms", "value_dim": 24, "rope": None}}


@dataclass(frozen=True, kw_only=True)
class Args(SoftmaxArgs):
    """`group` g tokens make one core token; at least the `window` s last ones are seen as they are."""

    group: int = 16
    window: int = 1024

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(group=self.group, window=self.window)
        if self.qk_norm is not None and self.qk_norm_full:
            raise ZooError("qk_norm_full was true; the core keys of each query head are normed by themselves")
        if self.softcap is not None:
            raise ZooError(f"softcap was {self.softcap}; attention to core tokens has none")


class CoreContextAttention(SoftmaxAttention):
    options = Args
    keeps_softmax = True
    bidirectional = False

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        if args.rope is not None:
            self.table = RotaryTable(config.ropes[args.rope], config.max_position_embeddings)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        return keep_projections(cls.options, spec, heads)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Output:
        if ctx.cu_seqlens is not None:
            return sequences(self.forward, x, ctx)
        args, (plain, gate), k = self.args, self.plain_queries(x), self.plain_keys(x)
        q, v = self.rotated_queries(plain, ctx), grouped(self.v_proj(x), self.kv_heads)
        core = self._cores(plain, k, v, ctx, cache)
        far = attend_entries(q, *core, ctx, args.group, args.group, args.scale, delay=args.window)
        near = self._local(q, {"k": self.rotated(k, "k_norm", ctx), "v": v}, ctx, cache)
        o = merge([far, *near]).flatten(-2)
        return self.o_proj(o if gate is None else o * torch.sigmoid(gate))

    def _cores(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """Core keys and values `[B, N, H, K]` of all groups that have ended, from what has no position yet."""
        found = ended({"group_k": k, "group_v": v}, ctx, cache, self.args.group, self.args.group)
        keys, values = (found.tokens[f"group_{name}"].unflatten(3, (self.kv_heads, 1)) for name in "kv")
        last = found.at_last(q).unflatten(2, (self.kv_heads, -1))
        scale = self.head_dim**-0.5 if self.args.scale is None else self.args.scale
        with checks.autocast_off(q):
            weights = (scale * (wide(last)[:, :, None] * wide(keys)).sum(-1)).softmax(2)[..., None]
            core_k = (weights * wide(keys)).sum(2).flatten(2, 3).to(k.dtype)
            core_v = (weights * wide(values)).sum(2).flatten(2, 3).to(v.dtype)
        if self.args.rope is not None:
            ctx_at = found.rotated_at(self.args.group - 1, self.table, self.args.rope, ctx)
            core_k = self.rotated(core_k, "k_norm", ctx_at)
        return entries("core_k", core_k, found, ctx, cache), entries("core_v", core_v, found, ctx, cache)

    def _local(
        self, q: Tensor, new: dict[str, Tensor], ctx: Context, cache: LayerCache | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Attention to the tokens of no core token: the last s - 1, and those before them back to a group's begin."""
        if cache is None:
            seen, q_at, k_at = all_tokens(new, ctx, None)
        else:
            seen, q_at, k_at = recent_tokens(new, ctx, cache.view("local"), self.recent)  # type: ignore[arg-type]
        k, v, window = seen["k"], seen["v"], self.args.window
        at, key_at = known_positions(q, Keys(k, v, q_at, k_at), ctx)
        call: dict[str, Any] = dict(scale=self.args.scale, return_lse=True, k_positions=key_at)
        parts = [attention(q, k, v, q_positions=at - window + 1, chunk=self.args.group, **call)]
        if window > 1:
            parts.append(attention(q, k, v, q_positions=at, window=window - 1, **call))
        return parts

    @property
    def recent(self) -> int:
        return int(self.args.window + self.args.group - 1)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        args, pair = self.args, (self.head_dim + self.value_dim) * itemsize
        core = count(length, args.group, args.group) * self.heads * pair
        pooled = (args.group - 1) * self.kv_heads * pair
        return core + pooled + self.recent * (self.kv_heads * pair + torch.int64.itemsize)


MODULE = CoreContextAttention
