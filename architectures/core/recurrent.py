"""What recurrent mixers share: short convolutions with their states, output gates, transfer from attention.

B batch, T new tokens, C channels, W convolution width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.cache_view import CacheView
from zoo.architectures.core.config import UNWEIGHTED, DecoderConfig
from zoo.architectures.core.mixer import Context, wide_dtype
from zoo.architectures.core.plan import AttentionSpec, Row
from zoo.errors import ZooError
from zoo.kernels.scan import scan, scan_step
from zoo.kernels.short_conv import short_conv

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


def scanned(x: Tensor, decay: Tensor, ctx: Context, cache: LayerCache | CacheView | None) -> Tensor:
    """`scan` of `x [B, T, C]` with the log `decay [B, T, C]`; the cache's `state [B, C]` is continued and kept."""
    if cache is None:
        return scan(x, decay, cu_seqlens=ctx.cu_seqlens)[0]
    state = cache.state("state", (x.shape[0], x.shape[2]), wide_dtype(x), "recurrent", x.device)
    if ctx.phase == "decode" and x.shape[1] == 1 and not torch.is_grad_enabled():
        return scan_step(x, decay, state=state)
    h, new = scan(x, decay, initial_state=state, output_final_state=True)
    assert new is not None
    cache.put("state", new)
    return h


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
    if spec.qk_norm not in (None, *UNWEIGHTED):
        rows += [Row(source=f"{n}.weight", target=f"{n}.weight") for n in ("q_norm", "k_norm")]
    return tuple(rows)


def _by_head(spec: AttentionSpec, name: str, heads: tuple[int, ...] | None) -> tuple[str, dict[str, Any]]:
    if heads is not None:
        chosen = heads if name == "q_proj" else [h // spec.group for h in heads]
        return "select_heads", {"heads": list(chosen), "head_dim": spec.head_dim}
    return ("copy", {}) if name == "q_proj" else ("expand_heads", {"group": spec.group, "head_dim": spec.head_dim})


def _check_transfer(spec: AttentionSpec) -> None:
    """Refuse attention whose queries or keys are made in a way that no recurrent mixer repeats."""
    ways = ("qk_norm_full", "qk_norm_after_rope", "output_gate", "temperature", "differential", "writes", "value_dim")
    for name in ways:
        if spec.args.get(name):
            raise ZooError(f"the source's attention uses {name}, which other mixers cannot take over; keep its layers")
