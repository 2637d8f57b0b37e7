"""A layer whose state is a small model, trained on every token it sees: TTT (arXiv 2407.04620), Titans (2501.00663).

With W_0 the weights where the token's mini-batch began, and row_t a factor for its place in the mini-batch,
    g_t = gradient at W_0 of |f(k_t) - v_t|^2 / 2
    S_t = exp(momentum_t) S_{t-1} + lr_t g_t        A_t = exp(decay_t) A_{t-1} + S_t        r_t = exp(decay_t) r_{t-1}
    W_t = r_t W_0 - row_t A_t        o_t = f(q_t; W_t)
A and r begin every mini-batch at 0 and 1; S goes on (without momentum, S_t = lr_t g_t).

Shapes: B batch, T tokens, N sequences (B, or the packed ones), H key heads, Hv value heads, K and V head widths,
F hidden width of the inner model, C tokens of a mini-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.test_time_training.checking import check, check_tree
from zoo.kernels.test_time_training.states import test_time_training_state
from zoo.kernels.test_time_training.step import test_time_training_step

__all__ = ["test_time_training", "test_time_training_state", "test_time_training_step"]

BACKENDS = dispatch.load(__name__)


def test_time_training(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: Mapping[str, Tensor],
    *,
    inner: Literal["linear", "mlp"] = "linear",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    momentum: Tensor | None = None,
    decay: Tensor | None = None,
    position_scale: Tensor | None = None,
    mini_batch: int = 16,
    initial_state: Mapping[str, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Train the inner model on (k_t, v_t), one step of gradient descent per mini-batch, and read it at q_t.

    The inner model is z = x W1 + b1 ("linear") or z = gelu(x W1 + b1) W2 + b2 ("mlp", tanh approximation). With a norm
    it is f(x) = x + layer_norm(z), as in TTT; without one f(x) = z. Without decay, momentum and position_scale,
    token t reads the weights after the gradients of the tokens up to t of its mini-batch.

    Args:
        q, k: [B, T, H, K], one dtype; value head j uses key head j // (Hv // H).
        v: [B, T, Hv, V], V = K with a norm.
        lr: learning rate of each token, [B, T, Hv], fp32 (fp64 beside fp64 inputs).
        weights: what sequences begin with, fp32 (fp64): W1 [Hv, K, V] and b1 [Hv, V]; for "mlp" W1 [Hv, K, F],
            b1 [Hv, F], W2 [Hv, F, V] and b2 [Hv, V].
        inner: "linear" or "mlp".
        norm_weight, norm_bias: [Hv, V], fp32 (fp64), both or none; the layer norm's epsilon is 1e-6.
        momentum: log <= 0 of Titans' eta, [B, T, Hv], fp32 (fp64).
        decay: log <= 0 of Titans' 1 - alpha, [B, T, Hv], fp32 (fp64).
        position_scale: [C] or [Hv, C], fp32 (fp64), factor on the sum of gradients at each place of a mini-batch (in
            TTT 1, 1/2, .. 1/C plus a learned offset); its last entry is the one that the next mini-batch begins with.
        mini_batch: C, tokens that share the weights where their gradients are taken.
        initial_state: the tree of `test_time_training_state`, or of an earlier call.
        output_final_state: return the state after the last token of every sequence.
        cu_seqlens: int32 [N + 1], boundaries of sequences packed along T in a batch of 1; empty sequences are legal.
        backend: pin one of this op's backends.

    Returns:
        o [B, T, Hv, V] in q's dtype, and the final state or None. The state carries the partial gradient and the place
        in the mini-batch, so a sequence may be split anywhere.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the pinned backend cannot run the call.
    """
    q, k, v = checks.autocast(q, k, v)
    check(q, k, v, lr, weights, inner, norm_weight, norm_bias, momentum, decay, position_scale, mini_batch)
    checks.check_length(q.shape[1], cu_seqlens)
    checks.check_cu_seqlens(cu_seqlens, q)
    check_tree("initial_state", initial_state, q, weights, inner, momentum, decay, cu_seqlens)
    norm = None if norm_weight is None else (norm_weight, norm_bias)
    options = (inner, norm, momentum, decay, position_scale, mini_batch)
    args = (q, k, v, lr, weights, *options, initial_state, output_final_state, cu_seqlens)
    o, state = dispatch.select(BACKENDS, backend, args).run(*args)
    return o, state
