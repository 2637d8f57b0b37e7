"""Averages of the values so far, weighted by exp(key): RWKV-4's WKV (arXiv 2305.13048) and AFT-Simple (2105.14103).

    with bonus u:  o_t = (sum over i < t of e^(k_i + d_it) v_i + e^(k_t + u) v_t) / (the same with v = 1)
    without:       o_t = sum over i <= t of e^(k_i + d_it) v_i / (the same with v = 1)

d_it sums the log decays of the tokens after i: up to t - 1 with bonus (the state before this token is read), up to t
without. RWKV-4's decay is -exp(time_decay); AFT-Simple has neither decay nor bonus.
"""

from typing import Any

from torch import Tensor

from zoo.kernels import checks, dispatch, steps

BACKENDS = dispatch.load(__name__)

State = tuple[Tensor, Tensor, Tensor]


def weighted_average(
    k: Tensor, v: Tensor, decay: Tensor | None = None, bonus: Tensor | None = None, *,
    initial_state: State | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:  # fmt: skip
    """The decayed, exponentially weighted average of the values, per channel, over T tokens.

    Args:
        k, v: [B, T, D], one dtype. A key of minus infinity leaves its token out; with none left in, o is 0.
        decay: log decay <= 0, None | [D] | [B, T, D], fp32 (fp64 beside fp64 inputs).
        bonus: [D], fp32 (fp64), added to the key of the token itself (RWKV-4's time_first).
        initial_state: (numerator, denominator, maximum), each [N, D], fp32 (fp64): the sums times exp(-maximum).
            The rest: see `zoo.kernels.dispatch`.

    Returns:
        o [B, T, D] in k's dtype, and the final state or None. An empty state has maximum -1e38.
    """
    k, v = checks.autocast(k, v)
    _check(k, v, decay, bonus, initial_state, cu_seqlens)
    return dispatch.recur(BACKENDS, backend, k, v, decay, bonus, initial_state, output_final_state, cu_seqlens)


def weighted_average_step(
    k: Tensor, v: Tensor, decay: Tensor | None = None, bonus: Tensor | None = None, *, state: State
) -> Tensor:
    """One token: o [B, 1, D]; the tensors of `state` are overwritten. No gradient."""
    k, v = checks.autocast(k, v)
    _check(k, v, decay, bonus, state, None, step=True)
    return _STEP(k, v, decay, bonus, list(state))


def _check(
    k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, state: Any, cu_seqlens: Any, step: bool = False
) -> None:
    checks.check_tokens("k", k, cu_seqlens, step)
    checks.check_shape("v", v, k.shape, "B T D")
    checks.check_like("v", v, k, k.dtype)
    checks.check_form("decay", decay, k, {"D": k.shape[2:], "B T D": k.shape})
    checks.check_gate("bonus", bonus, k, k.shape[2:], "D")
    parts = dict.fromkeys(("numerator", "denominator", "maximum"), (k.shape[2:], "D"))
    checks.check_states(state, k, parts, cu_seqlens, step)


ARGUMENTS = "Tensor k, Tensor v, Tensor? decay, Tensor? bonus"
_STEP = steps.op("weighted_average_step", ARGUMENTS, BACKENDS["reference"].run, tree=True)
