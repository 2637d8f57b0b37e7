"""Feed-forward experts, and matrix products of rows that are grouped by expert.

S rows sorted by expert, E experts, I inputs, O outputs, D width of an expert's input and output, F its inner width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.activations import ACTIVATIONS

ALPHA = 1.702  # sigmoid(1.702 x) x is close to gelu(x)


class Dense(nn.Module):
    """An expert that every token goes through: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` when not gated."""

    def __init__(self, width: int, inner: int, activation: str, gated: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(width, inner, bias=False) if gated else None
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(
            self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x)) * up
        )


class Experts(nn.Module):
    """E experts, stacked: `gate_up_proj [E, 2F, D]` (gate first), `down_proj [E, D, F]`, biases `gate_up_bias [E, 2F]`,
    `down_bias [E, D]`; experts that are not gated have `up_proj [E, F, D]` and `up_bias [E, F]`.

    With `limit`, gated experts clamp their gate from above and their up projection on both sides, and compute
    `down((up + 1) * gate * sigmoid(ALPHA * gate))` (gpt-oss).
    """

    def __init__(
        self, count: int, width: int, inner: int, activation: str, gated: bool, bias: bool, limit: float | None
    ) -> None:
        super().__init__()
        self.activation, self.limit = ACTIVATIONS[activation], limit
        self.first = "gate_up" if gated else "up"
        rows = 2 * inner if gated else inner
        self.register_parameter(f"{self.first}_proj", nn.Parameter(torch.empty(count, rows, width)))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))
        self.register_parameter(f"{self.first}_bias", nn.Parameter(torch.zeros(count, rows)) if bias else None)
        self.down_bias = nn.Parameter(torch.zeros(count, width)) if bias else None

    def init_weights(self, std: float) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                initialization.zeros_(parameter)
            else:
                initialization.normal_(parameter, std=std)

    def forward(self, x: Tensor, owner: Tensor) -> Tensor:
        """Rows `x [S, D]` through the experts `owner [S]`, which must not decrease: `[S, D]`."""
        count = self.down_proj.shape[0]
        ends = torch.searchsorted(owner, torch.arange(count, device=owner.device), right=True).int()
        hidden = grouped_linear(x, getattr(self, f"{self.first}_proj"), ends)
        if (bias := getattr(self, f"{self.first}_bias")) is not None:
            hidden = hidden + bias[owner].to(hidden.dtype)
        out = grouped_linear(self._activate(hidden), self.down_proj, ends)
        return out if self.down_bias is None else out + self.down_bias[owner].to(out.dtype)

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.first == "up":
            return self.activation(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        if self.limit is None:
            return self.activation(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(ALPHA * gate)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`y[s] = weight[e] x[s]` for the rows `s` of expert `e`: `x [S, I]`, `weight [E, O, I]` to `[S, O]`.

    `ends [E]` (int32) counts the rows of the experts up to and including each. Computed by torch's grouped product
    where there is one for the device and dtype, else expert by expert for those that have rows.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x, weight = (t.to(torch.get_autocast_dtype(kind)) if t.dtype != torch.float64 else t for t in (x, weight))
    if _has_grouped_mm(x, weight):
        product: Tensor = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
        return product
    looped: Tensor = _linear(x, weight, ends)
    return looped


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    if not x.is_cuda or x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return False
    aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0  # rows must start at multiples of 16 bytes
    return aligned and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _spans(ends: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


# ops, so that compilers need not know how many rows each expert has
@torch.library.custom_op("zoo::expert_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, rows in _spans(ends):
        torch.mm(x[rows], weight[expert].t(), out=out[rows])
    return out


@torch.library.custom_op("zoo::expert_outer", mutates_args=())
def _outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """`[E, O, I]`: the sum of `grad[s] x[s]^T` over the rows of each expert."""
    out = x.new_zeros(ends.shape[0], grad.shape[1], x.shape[1])
    for expert, rows in _spans(ends):
        torch.mm(grad[rows].t(), x[rows], out=out[expert])
    return out


@_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors  # type: ignore[attr-defined]
    needs_x, needs_weight, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad = grad.contiguous()
    return (
        _linear(grad, weight.transpose(1, 2), ends) if needs_x else None,
        _outer(grad, x, ends) if needs_weight else None,
        None,
    )


_linear.register_autograd(_gradients, setup_context=_save)
