"""What recurrent mixers share: short convolutions with their states, output gates, transfer from attention.

B batch, T new tokens, C channels, W convolution width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.cache_view import CacheView
from zoo.architectures.core.config import UNWEIGHTED, DecoderConfig
from zoo.architectures.core.mixer import Context, wide_dtype
from zoo.architectures.core.plan import AttentionSpec, Init, Row
from zoo.errors import ZooError
from zoo.kernels.scan import scan, scan_step
from zoo.kernels.short_conv import short_conv

# attention options that change queries, keys or outputs in ways that other mixers have no parameter for
UNTRANSFERRED = (
    "qk_norm_after_rope",
    "sink_logits",
    "output_gate",
    "temperature",
    "differential",
    "writes",
    "value_dim",
)
GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid, "linear": lambda x: x}


def gate_activation(name: str | None) -> Callable[[Tensor], Tensor]:
    """The output gate's activation; None is the identity."""
    if name is None:
        return lambda x: x
    if name not in GATES:
        raise ZooError(f"gate {name!r} is unknown; it must be one of {', '.join(GATES)}, or null for none")
    return GATES[name]


def check_rope(rope: str | None, config: DecoderConfig) -> None:
    """Refuse a rotary table that the config does not have."""
    if rope is not None and rope not in config.ropes:
        raise ZooError(f"rope {rope!r} names no table; the config has {', '.join(config.ropes) or 'none'}")


def continued(
    op: Callable[..., Any],
    step: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    states: Mapping[str, Sequence[int]],
    ctx: Context,
    cache: LayerCache | CacheView | None,
    *,
    dtype: torch.dtype | None = None,
    fills: Sequence[float] = (),
    **options: Any,
) -> Tensor:
    """A recurrence over the cache: its states are continued and kept, and without a cache each sequence begins anew.

    Args:
        op, step: the op and its step for one token, called with `tensors`, of which the first is `[B, T, ...]`, and
            `options`.
        states: the cache's name of each state and its shape without the batch; several are one tuple for the op.
        dtype: that of the states; default: fp32, or fp64 beside fp64.
        fills: what each fresh state holds, zeros by default.
    """
    if cache is None:
        y: Tensor = op(*tensors, cu_seqlens=ctx.cu_seqlens, **options)[0]
        return y
    x = tensors[0]
    assert x is not None
    held = tuple(
        cache.state(name, (x.shape[0], *shape), dtype or wide_dtype(x), "recurrent", x.device, fill)
        for (name, shape), fill in zip(states.items(), fills or [0.0] * len(states), strict=True)
    )
    state = held if len(held) > 1 else held[0]
    if ctx.phase == "decode" and x.shape[1] == 1 and not torch.is_grad_enabled():
        y = step(*tensors, state=state, **options)
        return y
    y, new = op(*tensors, initial_state=state, output_final_state=True, **options)
    for name, value in zip(states, new if len(held) > 1 else (new,), strict=True):
        cache.put(name, value)
    return y


def scanned(x: Tensor, decay: Tensor, ctx: Context, cache: LayerCache | CacheView | None) -> Tensor:
    """`scan` of `x [B, T, C]` with the log `decay [B, T, C]`, over the cache's `state [B, C]`."""
    return continued(scan, scan_step, (x, decay), {"state": x.shape[2:]}, ctx, cache)


class ConvStates(nn.Module):
    """Depthwise causal convolutions, one per named projection, each with weight `[C, W]`; width 0 makes none.

    `forward(name, x [B, T, C], ctx, cache) -> [B, T, C]`.
    """

    def __init__(self, channels: Mapping[str, int], width: int, activation: str | None, bias: bool = False) -> None:
        super().__init__()
        self.width, self.channels = width, dict(channels)
        self.activation = cast(Literal["silu"] | None, activation)
        for name, count in channels.items() if width else ():
            self.register_parameter(name, nn.Parameter(torch.empty(count, width)))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(count)))
        self.reset()

    def reset(self) -> None:
        """Uniform in +-1/sqrt(W), the start of torch's depthwise convolution."""
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                initialization.zeros_(parameter)
            else:
                bound = 1 / math.sqrt(self.width)
                initialization.uniform_(parameter, -bound, bound)

    def forward(self, name: str, x: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        if not self.width:
            return x if self.activation is None else F.silu(x)
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias", None)
        if cache is None:
            return short_conv(x, weight, bias, activation=self.activation, cu_seqlens=ctx.cu_seqlens)[0]
        key = f"conv_{name}"
        state = cache.state(key, (x.shape[0], x.shape[2], self.width), x.dtype, "conv", x.device)
        y, new = short_conv(x, weight, bias, activation=self.activation, initial_state=state, output_final_state=True)
        assert new is not None
        cache.put(key, new.to(x.dtype), "conv")
        return y

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of the last inputs kept for one sequence."""
        return sum(self.channels.values()) * self.width * itemsize


def identity_convs(spec: AttentionSpec, names: Sequence[str], channels: int) -> tuple[Init, ...]:
    """Short convolutions `convs.{name}` that change nothing at the start, of width `conv` if that is wanted, else 4."""
    width = int(spec.wanted.get("conv", 4))
    made = (Init(target=f"convs.{name}", shape=(channels, width), kind="identity_conv") for name in names)
    return tuple(made) if width else ()


def transferred_rows(spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> tuple[Row, ...]:
    """q, k, v, o (and q/k norms) of attention for a mixer whose every head has its own keys and values.

    Query head h reads KV head `h // group`, so keys and values are repeated head by head; with `heads`, only those
    are taken.
    """
    _check_transfer(spec)
    rows = []
    for name, present in (("q_proj", spec.q_bias), ("k_proj", spec.k_bias), ("v_proj", spec.v_bias)):
        operation, options = _by_head(spec, name, heads)
        for part in ("weight", "bias") if present else ("weight",):
            rows.append(Row(source=f"{name}.{part}", target=f"{name}.{part}", operation=operation, options=options))
    if heads is None:
        rows.append(Row(source="o_proj.weight", target="o_proj.weight"))
    else:
        options = {"heads": list(heads), "head_dim": spec.head_dim, "dim": 1}
        rows.append(Row(source="o_proj.weight", target="o_proj.weight", operation="select_heads", options=options))
    if spec.o_bias:
        rows.append(Row(source="o_proj.bias", target="o_proj.bias"))
    return *rows, *_norm_rows(spec, heads)


def _norm_rows(spec: AttentionSpec, heads: tuple[int, ...] | None) -> list[Row]:
    """The norm of all keys at once is that of its repeated heads: each counts as often as any other."""
    full = bool(spec.args.get("qk_norm_full"))
    if full and heads is not None:
        raise ZooError(
            "the source's attention uses qk_norm_full, one norm for all heads of a layer; keep or convert all"
        )
    if spec.qk_norm in (None, *UNWEIGHTED):
        return []
    repeated: dict[str, Any] = {
        "operation": "expand_heads",
        "options": {"group": spec.group, "head_dim": spec.head_dim},
    }
    return [
        Row(source="q_norm.weight", target="q_norm.weight"),
        Row(source="k_norm.weight", target="k_norm.weight", **(repeated if full else {})),
    ]


def _by_head(spec: AttentionSpec, name: str, heads: tuple[int, ...] | None) -> tuple[str, dict[str, Any]]:
    if heads is not None:
        chosen = heads if name == "q_proj" else [h // spec.group for h in heads]
        return "select_heads", {"heads": list(chosen), "head_dim": spec.head_dim}
    return ("copy", {}) if name == "q_proj" else ("expand_heads", {"group": spec.group, "head_dim": spec.head_dim})


def _check_transfer(spec: AttentionSpec) -> None:
    """Refuse attention whose queries or keys are made in a way that no recurrent mixer repeats."""
    for name in UNTRANSFERRED:
        if spec.args.get(name):
            raise ZooError(f"the source's attention uses {name}, which other mixers cannot take over; keep its layers")
