"""How linear attention ends: a norm on the heads' outputs, a gate from the input, the output projection.

B batch, T new tokens, D hidden size, H heads, V value head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import NORM_START, Projected, ProjectionArgs, group_norm, norm_start
from zoo.architectures.core.mixer import grouped, wide
from zoo.architectures.core.plan import Init, Start
from zoo.architectures.core.recurrent import gate_activation
from zoo.errors import ZooError


@dataclass(frozen=True, kw_only=True)
class OutputArgs(ProjectionArgs):
    """`gate` is the activation of the output gate (None: no gate); `norm` puts an RMS norm on each head's output, or
    one on all heads side by side if `norm_full`. It has one weight per channel of a head, of its own for every head if
    `norm_per_head` or `norm_full`, and none without `norm_weight`; `norm_center` subtracts the mean first.
    """

    gate: str | None = "silu"
    gate_bias: bool = False
    norm: bool = True
    norm_full: bool = False
    norm_per_head: bool = False
    norm_weight: bool = True
    norm_center: bool = False
    norm_eps: float = 1e-5

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        gate_activation(self.gate)
        if self.norm_full and self.norm_per_head:
            raise ZooError("norm_full and norm_per_head were both given; choose one")


class GatedOutput(Projected):
    """A mixer with attention's projections, whose output is normed and gated: `o_norm`, `g_proj`, `o_proj`."""

    def make_output(self, config: DecoderConfig, args: OutputArgs, value_dim: int) -> None:
        self.output_args, values = args, self.heads * value_dim
        if args.gate is not None:
            self.g_proj = nn.Linear(config.hidden_size, values, bias=args.gate_bias)
        if args.norm and args.norm_weight:
            shape = (values,) if args.norm_full else (self.heads, value_dim) if args.norm_per_head else (value_dim,)
            self.o_norm = nn.Parameter(torch.ones(shape))

    def init_weights(self, std: float) -> None:
        if hasattr(self, "o_norm"):
            initialization.ones_(self.o_norm)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Outputs `o [B, T, H, V]` of the recurrence for the input `x [B, T, D]`, to `[B, T, D]`."""
        args, o = self.output_args, o.to(x.dtype)
        if args.norm:
            o = grouped(self._normed(o.flatten(-2)), self.heads) if args.norm_full else self._normed(o)
        if args.gate is not None:
            o = o * gate_activation(args.gate)(grouped(self.g_proj(x), self.heads))
        return self.o_proj(o.flatten(-2))

    def _normed(self, o: Tensor) -> Tensor:
        args, centered = self.output_args, o
        if args.norm_center:
            centered = wide(o) - wide(o).mean(-1, keepdim=True)
        weight = self.o_norm if args.norm_weight else o.new_ones(())
        return group_norm(centered, weight, args.norm_eps).to(o.dtype)


# Arguments and starts for a mixer made from attention: each head's norm is its own, the gate is open and constant.
OPEN_GATE = {"gate": "silu", "gate_bias": True, "norm_per_head": True}


SCALE = Start(target="o_norm", means="scale", form=norm_start)


def open_gate(heads: int, value_dim: int, hidden_size: int) -> tuple[Init, ...]:
    """The new parameters of the output under `OPEN_GATE`."""
    width = heads * value_dim
    return (
        Init(target="g_proj.weight", shape=(width, hidden_size), kind="zeros"),
        # silu(1.278) = 1: the gate starts open and constant, with a gradient
        Init(target="g_proj.bias", shape=(width,), kind="constant", options={"value": 1.27846}),
        Init(target="o_norm", shape=(heads, value_dim), kind="constant", options={"value": NORM_START}),
    )
