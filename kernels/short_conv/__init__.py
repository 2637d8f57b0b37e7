"""Short depthwise causal convolution, as Mamba and Gated DeltaNet put before their recurrences.

    y_t[d] = bias[d] + sum over i < W of weight[d, i] x_{t - W + 1 + i}[d]

Shapes: B batch, T tokens, N sequences (B, or the packed ones), D channels, W filter width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.short_conv.checking import check
from zoo.kernels.short_conv.step import short_conv_step

__all__ = ["short_conv", "short_conv_step"]

BACKENDS = dispatch.load(__name__)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution over T tokens.

    Args:
        x: [B, T, D].
        weight: [D, W], the last column meets the token itself; any float dtype.
        bias: [D].
        activation: None or "silu", applied to the result.
        initial_state: [N, D, W], the W inputs before the first token, oldest first; x's dtype or fp32. None is zeros.
        output_final_state: return the last W inputs of every sequence, in x's dtype.
        cu_seqlens: int32 [N + 1], boundaries of sequences packed along T in a batch of 1; empty sequences are legal.
        backend: pin one of this op's backends.

    Returns:
        y [B, T, D] in x's dtype, and the final state [N, D, W] or None. Sums are taken in fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape, dtype or device is wrong, or the pinned backend cannot run the call.
    """
    (x,) = checks.autocast(x)
    check(x, weight, bias, activation, initial_state, cu_seqlens)
    args = (x, weight, bias, activation, initial_state, output_final_state, cu_seqlens)
    y, state = dispatch.select(BACKENDS, backend, args).run(*args)
    return y, state
