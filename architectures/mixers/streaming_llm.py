"""StreamingLLM: the first tokens and a window of the last ones, at any length (Xiao et al. 2023, arXiv 2309.17453).

    S(t) = {j < sinks} & {t - window < j <= t}        window = budget - sinks

Nothing else is kept. Positions are those inside the cache: with g = max(0, t + 1 - budget) tokens dropped before it, a
query lies at t - g, a key of the window at j - g, a sink at j, so that none leaves the range that a model was trained
on. Among the window's keys that changes nothing; to meet the sinks the query turns back by g, and keys stay as they
are stored. `reindex` false leaves the sinks at their distance in the text.

Queries of a model of another kind come rotated: `turn` must then know how; without it positions are the text's.

B batch, T new tokens, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoo.architectures.core.config import UNWEIGHTED, DecoderConfig
from zoo.architectures.core.keys import Keys
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.rope import RotaryTable
from zoo.architectures.core.softmax import merge
from zoo.architectures.core.sparse import Method, SparseAttention, View
from zoo.architectures.core.streams import StreamArgs, attend_stream, first_keys, keys_of, query_places
from zoo.errors import ZooError
from zoo.kernels.attention import attention

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "budget": 1.0}
VARIANTS = {
    "small": {**EXAMPLE, "budget": 6, "sinks": 2, "qk_norm": "rms"},
    "in_place": {**EXAMPLE, "budget": 5, "sinks": 1, "reindex": False},
}


@dataclass(frozen=True, kw_only=True)
class Args(StreamArgs):
    """With `reindex`, positions are those inside the cache."""

    reindex: bool = True

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        if self.reindex and self.rope and self.qk_norm_after_rope and self.qk_norm not in (None, *UNWEIGHTED):
            raise ZooError(f"qk_norm was {self.qk_norm!r} after RoPE, whose weights do not turn; reindex must be false")
        if self.reindex and self.rope and config.ropes[self.rope].scaling.get("rope_type") == "longrope":
            raise ZooError(f"rope {self.rope!r} is longrope, which turns in two ways; reindex must be false")


class StreamingLLM(Method):
    phases = ("prefill", "decode")
    name = "streaming_llm"
    turn: Callable[[Tensor, Tensor], Tensor] | None = None
    """Queries `[B, T, H, K]` as they were `steps [1 or B, T]` positions earlier."""

    def prefill(self, view: View) -> Tensor:
        return self.stream(view.q, keys_of(view), scale=view.scale, cu_seqlens=view.cu_seqlens)

    def decode(self, view: View) -> Tensor:
        window, sinks = self.args.window, self.args.sinks
        if window is None:
            return self.prefill(view)
        if self.turn is None or not sinks:
            return attend_stream(view, window, sinks)[0]
        near = attend_stream(view, window, 0)
        return merge([near, self.far(view.q, keys_of(view), scale=view.scale)])

    def stream(self, q: Tensor, keys: Keys, **call: Any) -> Tensor:
        """`[B, T, H, K]`; `keys` are all that queries see, or more, and `call` is for `attention`."""
        window, sinks = self.args.window, self.args.sinks
        call |= dict(window=window, q_positions=keys.q_positions, k_positions=keys.k_positions)
        if window is None or self.turn is None or not sinks:
            o: Tensor = attention(q, keys.k, keys.v, sink_tokens=0 if window is None else sinks, **call)
            return o
        near = attention(q, keys.k, keys.v, return_lse=True, **call)
        return merge([near, self.far(q, keys, **{name: call.get(name) for name in ("scale", "cu_seqlens", "backend")})])

    def far(self, q: Tensor, keys: Keys, cu_seqlens: Tensor | None = None, **call: Any) -> Any:
        """Attention to the sinks that lie before the window, with the logs of its denominators."""
        window, sinks = self.args.window, self.args.sinks
        assert self.turn is not None and window is not None
        k, v, at = first_keys(keys, sinks, cu_seqlens)
        places = query_places(q, keys, cu_seqlens)
        q = self.turn(q, (places + 1 - window - sinks).clamp(min=0))
        before = (places - window).expand(q.shape[:2])
        return attention(q, k, v, q_positions=before, k_positions=at, cu_seqlens=cu_seqlens, return_lse=True, **call)


class StreamingLLMAttention(SparseAttention):
    options = Args
    method = StreamingLLM
    phase_consistent = True

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__(config, args)
        if args.rope is not None and args.reindex:
            self.table = RotaryTable(config.ropes[args.rope], config.max_position_embeddings)
            self.rule.turn = self.turn

    @property
    def recent(self) -> int | None:
        window: int | None = self.args.window
        return None if window is None else window - 1

    def turn(self, q: Tensor, steps: Tensor) -> Tensor:
        return self.table.turn_back(q, steps)

    def attend(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        backend = "eager" if ctx.eager else None
        o: Tensor = self.rule.stream(q, keys, scale=self.args.scale, cu_seqlens=ctx.cu_seqlens, backend=backend)
        return o


MODULE = StreamingLLMAttention
