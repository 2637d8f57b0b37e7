"""The elementwise recurrence of HGRN (arXiv 2311.04823) and RG-LRU (Griffin, arXiv 2402.19427)."""

from torch import Tensor

from zoo.kernels import checks, dispatch, steps

BACKENDS = dispatch.load(__name__)


def scan(
    x: Tensor, decay: Tensor, *, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The running, decayed sum of x over T tokens.

    Args:
        x: [B, T, D].
        decay: log decay <= 0, [B, T, D], fp32 (fp64 beside fp64 inputs).
        initial_state: [N, D], fp32 (fp64). None is zeros. The rest: see `zoo.kernels.dispatch`.

    Returns:
        h [B, T, D] in x's dtype, and the final state [N, D] or None.
    """
    (x,) = checks.autocast(x)
    _check(x, decay, initial_state, cu_seqlens)
    return dispatch.recur(BACKENDS, backend, x, decay, initial_state, output_final_state, cu_seqlens)


def scan_step(x: Tensor, decay: Tensor, *, state: Tensor) -> Tensor:
    """One token: h [B, 1, D]; `state` [B, D] is overwritten. No gradient."""
    (x,) = checks.autocast(x)
    _check(x, decay, state, None, step=True)
    return _STEP(x, decay, state)


def _check(x: Tensor, decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, *, step: bool = False) -> None:
    checks.check_tokens("x", x, cu_seqlens, step)
    checks.check_gate("decay", decay, x, x.shape, "B T D", required=True)
    checks.check_state(state, x, x.shape[2:], "D", cu_seqlens, step)


_STEP = steps.op("scan_step", "Tensor x, Tensor decay", BACKENDS["reference"].run)
