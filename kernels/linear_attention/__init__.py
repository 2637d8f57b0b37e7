"""Linear attention with optional decay: the recurrence of Linear Transformer, RetNet, RWKV-5/6, Mamba-2, GLA, HGRN2."""

from typing import Any, Literal

from torch import Tensor

from zoo.kernels import checks, dispatch, steps

BACKENDS = dispatch.load(__name__)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, *, value_decay: Tensor | None = None,
    bonus: Tensor | None = None, normalize: Literal["sum"] | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Causal linear attention over T tokens.

    Args:
        q, k: [B, T, H, K], one dtype; value head j uses key head j // (Hv // H).
        v: [B, T, Hv, V].
        decay: log decay <= 0, None | [Hv] | [Hv, K] | [B, T, Hv] | [B, T, Hv, K], fp32 (fp64 beside fp64 inputs).
        value_decay: log decay <= 0 on the value axis, [B, T, Hv, V].
        bonus: [Hv] | [Hv, K] (RWKV): o_t = scale q_t (S_{t-1} + Diag(bonus) k_t^T v_t), read before this token's decay.
        normalize: "sum" divides q_t S_t by d = q_t z_t^T, where z sums the decayed keys and |d| is held at 1e-6 or
            more; the scale then cancels and the state is [N, Hv, K, V + 1] with z in its last column.
        scale: factor on q, K ** -0.5 by default.
        initial_state: [N, Hv, K, V], fp32 (fp64). The rest: see `zoo.kernels.dispatch`.

    Returns:
        o [B, T, Hv, V] in q's dtype, and the final state or None.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.check_recurrence(q, k, v, decay, initial_state, cu_seqlens, columns=_columns(normalize))
    _check_options(q, v, value_decay, bonus)
    options = (decay, value_decay, bonus, normalize, checks.default_scale(scale, q))
    return dispatch.recur(BACKENDS, backend, q, k, v, *options, initial_state, output_final_state, cu_seqlens)


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, *, state: Tensor, value_decay: Tensor | None = None,
    bonus: Tensor | None = None, normalize: Literal["sum"] | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """One token: o [B, 1, Hv, V]; `state` [B, Hv, K, V], or V + 1 columns, is overwritten. No gradient."""
    q, k, v = checks.autocast(q, k, v)
    checks.check_recurrence(q, k, v, decay, state, columns=_columns(normalize), step=True)
    _check_options(q, v, value_decay, bonus)
    return _STEP(q, k, v, decay, value_decay, bonus, normalize, checks.default_scale(scale, q), state)


def _columns(normalize: str | None) -> int:
    """How many the state has beside those of v."""
    if normalize not in (None, "sum"):
        raise ValueError(f'normalize is {normalize!r}; it must be None or "sum"')
    return int(normalize == "sum")


def _check_options(q: Tensor, v: Tensor, value_decay: Tensor | None, bonus: Tensor | None) -> None:
    checks.check_gate("value_decay", value_decay, q, v.shape, "B T Hv V")
    shape = (v.shape[2], q.shape[3])
    checks.check_form("bonus", bonus, q, {"Hv": shape[:1], "Hv K": shape})


def _step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, *rest: Any) -> Tensor:
    value_decay, bonus, normalize, scale, state = rest
    if value_decay is None and bonus is None and normalize is None:
        return steps.matrix(state, q, k, v, decay, scale=scale)
    return steps.by_run(BACKENDS["reference"].run, q, k, v, decay, *rest)


ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? value_decay, Tensor? bonus, str? normalize, "
ARGUMENTS += "float scale"
_STEP = steps.in_place("linear_attention_step", ARGUMENTS, _step)
