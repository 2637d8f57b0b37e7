"""The vocabulary of weight transfer: what conversion and loading do to each tensor, as data.

A plan needs no module and no tensor, so that it can be shown, streamed and checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Softmax attention as a mixer finds it in a source: what `from_attention` may depend on.

    `args` are the attention mixer's own arguments (heads, kv_heads, head_dim, biases, qk_norm, rope, window, ...);
    `max_position` is the length the source was trained for, in tokens; `wanted` are options that the user sets on the
    mixer to be made, for those whose new tensors depend on them.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    qk_norm: str | None = None
    rope: str | None = None
    scale: float | None = None
    norm_eps: float = 1e-6
    max_position: int = 2048
    args: Mapping[str, Any] = field(default_factory=dict)
    wanted: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, kw_only=True)
class Row:
    """One transferred tensor: `source` (a name inside the attention mixer) through `operation` to `target`.

    Operations: `copy`; `expand_heads(group, head_dim)`: `[Hkv * d, ...] -> [Hkv * group * d, ...]`, head h from KV head
    h // group; `select_heads(heads, head_dim, dim)`: the given heads' rows (dim 0) or columns (dim 1).
    """

    source: str
    target: str
    operation: str = "copy"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Init:
    """One new tensor: `target` of `shape`, started by `kind`.

    Kinds: `zeros`, `ones`, `constant(value)`, `normal(std)`, `identity_conv` (1 at the last tap),
    `log_uniform(low, high)`, `linspace(low, high)` over the flattened tensor, `values(values)`, `orthogonal_features`.
    Random kinds are seeded by the tensor's full name. `fp32` keeps it in fp32 whatever the source's dtype.
    """

    target: str
    shape: tuple[int, ...]
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fp32: bool = False


@dataclass(frozen=True, kw_only=True)
class Start:
    """A new tensor that can start from what the attention does on text, in place of its `Init`.

    Args:
        target: its name inside the mixer.
        means: what is measured of each head: "rate", the decay of a state per token (of its logarithm, above 0);
            "beta", the strength of writing (between 0 and 1); "scale", by what its `Init` is to be multiplied.
        form: from the measured numbers `[H]` (fp64) and the mixer's typed arguments to those of the tensor: one for
            all heads, one for each, or all.
    """

    target: str
    means: Literal["rate", "beta", "scale"]
    form: Callable[[Tensor, Any], Tensor] = lambda values, args: values


@dataclass(frozen=True, kw_only=True)
class MixerPlan:
    """How a mixer is made from attention: its `args`, the transferred `rows`, and the `inits` of new parameters."""

    args: Mapping[str, Any]
    rows: tuple[Row, ...]
    inits: tuple[Init, ...]
