"""Short depthwise causal convolution, as Mamba and Gated DeltaNet put before their recurrences."""

from typing import Any, Literal

from torch import Tensor

from zoo.kernels import checks, dispatch, steps

BACKENDS = dispatch.load(__name__)


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Depthwise causal convolution over T tokens.

    Args:
        x: [B, T, D].
        weight: [D, W] of filter width W; the last column meets the token itself; any float dtype.
        bias: [D].
        activation: None or "silu", applied to the result.
        initial_state: [N, D, W], the W inputs before the first token, oldest first; x's dtype or fp32. None is zeros.
            The rest: see `zoo.kernels.dispatch`.

    Returns:
        y [B, T, D] and the final state [N, D, W] or None, in x's dtype. Sums are taken in fp32 (fp64 for fp64).
    """
    (x,) = checks.autocast(x)
    _check(x, weight, bias, activation, initial_state, cu_seqlens)
    return dispatch.recur(BACKENDS, backend, x, weight, bias, activation, initial_state, output_final_state, cu_seqlens)


def short_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: Tensor, activation: Literal["silu"] | None = None,
) -> Tensor:  # fmt: skip
    """One token: y [B, 1, D]; `state` [B, D, W], the last W inputs, is overwritten. No gradient."""
    (x,) = checks.autocast(x)
    _check(x, weight, bias, activation, state, None, step=True)
    return _STEP(x, weight, bias, activation, state)


def _check(
    x: Tensor, weight: Tensor, bias: Any, activation: str | None, state: Any, cu_seqlens: Any, *, step: bool = False
) -> None:
    checks.check_tokens("x", x, cu_seqlens, step)
    checks.check_shape("weight", weight, None, "D W")
    checks.check_shape("weight", weight, (x.shape[2], max(weight.shape[1], 1)), "D W")
    checks.check_like("weight", weight, x)
    if bias is not None:
        checks.check_shape("bias", bias, x.shape[2:], "D")
        checks.check_like("bias", bias, x)
    if activation not in (None, "silu"):
        raise ValueError(f'activation is {activation!r}; it must be None or "silu"')
    dtype = x.dtype if isinstance(state, Tensor) and state.dtype == x.dtype else None
    checks.check_state(state, x, weight.shape, "D W", cu_seqlens, step, dtype=dtype)


_STEP = steps.op("short_conv_step", "Tensor x, Tensor weight, Tensor? bias, str? activation", BACKENDS["reference"].run)
