"""Attention to keys and values that an earlier layer wrote (Sun et al. 2024, YOCO, arXiv 2405.05254; Brandon et al.
2024, arXiv 2405.12981).

    o_t = softmax(q_t K^T) V,   q_t = x_t W_q,   K and V those of the layer with `writes=` the same name

It has queries and an output of its own, makes no keys and keeps no cache.

B batch, T new tokens, S keys, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.keys import Keys, from_values, shared_names
from zoo.architectures.core.mixer import Context
from zoo.architectures.mixers import attention
from zoo.errors import ZooError

SHARED = ("head_dim", "value_dim", "window", "sinks", "chunk")
FULL = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"}
LOCAL = {**FULL, "window": 4, "sinks": 1}
BEFORE = (("attention", {**FULL, "writes": "kv"}), ("attention", {**LOCAL, "writes": "local"}))
EXAMPLE = {**FULL, "kv": "kv"}
VARIANTS = {
    "window": {**LOCAL, "kv": "local", "qk_norm": "rms", "o_bias": True},
    "differential": {**FULL, "kv": "kv", "differential": 0.4},
}


@dataclass(frozen=True, kw_only=True)
class Args(attention.Args):
    """`kv` is the name that the writing layer gives as `writes`. Head sizes and mask must be those of the writer."""

    kv: str

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        for name in ("k_bias", "v_bias", "writes"):
            if getattr(self, name):
                raise ZooError(f"{name} was {getattr(self, name)!r}; mixer 'cross' makes no keys: leave it out")
        for layer in config.layers:
            if layer.mixer == "attention" and layer.mixer_args.get("writes") == self.kv:
                self._check_writer(attention.Attention.parse(layer.mixer_args))

    def _check_writer(self, writer: attention.Args) -> None:
        own, given = self.kv_heads or self.heads, writer.kv_heads or writer.heads
        if own != given:
            raise ZooError(f"kv_heads was {own}; the layer that writes {self.kv!r} has {given}: use its number")
        for name in SHARED:
            if getattr(self, name) != getattr(writer, name):
                found = getattr(writer, name)
                raise ZooError(
                    f"{name} was {getattr(self, name)}; the layer that writes {self.kv!r} has {found}: use it"
                )


class CrossAttention(attention.Attention):
    options = Args
    makes_keys = False

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        return super().default_args(hidden_size, heads) | {"kv": "kv"}

    @classmethod
    def reads_of(cls, args: Args) -> tuple[str, ...]:
        return shared_names(args.kv)

    def visible(self, x: Tensor, ctx: Context, cache: LayerCache | None) -> Keys:
        return from_values(self.args.kv, ctx)

    def expanded_qkv(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        raise ZooError("mixer 'cross' makes no keys and values")

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return 0


MODULE = CrossAttention
