"""A layer whose state is a small model, trained on every token it sees: TTT (arXiv 2407.04620), Titans (2501.00663).

Shapes: F hidden width of the inner model, C tokens of a mini-batch.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.kernels import checks, dispatch, steps
from zoo.kernels.packed import prepare
from zoo.kernels.test_time_training.chunked import advance
from zoo.kernels.test_time_training.reference import OFFSET, WEIGHTS, names, test_time_training_state

__all__ = ["test_time_training", "test_time_training_state", "test_time_training_step"]

BACKENDS = dispatch.load(__name__)

Shapes = dict[str, tuple[str, Any]]  # axes and sizes by name


def test_time_training(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, weights: Mapping[str, Tensor], *,
    inner: Literal["linear", "mlp"] = "linear", norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
    momentum: Tensor | None = None, decay: Tensor | None = None, position_scale: Tensor | None = None,
    mini_batch: int = 16, initial_state: Mapping[str, Tensor] | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:  # fmt: skip
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
        initial_state: the tree of `test_time_training_state`, or an earlier call. The rest: see `zoo.kernels.dispatch`.

    Returns:
        o [B, T, Hv, V] in q's dtype, and the final state or None. The state carries the partial gradient and the place
        in the mini-batch, so a sequence may be split anywhere.
    """
    q, k, v = checks.autocast(q, k, v)
    given, options = (q, k, v, lr, weights, inner), (momentum, decay, position_scale, mini_batch)
    norm = _check(*given, norm_weight, norm_bias, *options, initial_state, cu_seqlens)
    return dispatch.recur(BACKENDS, backend, *given, norm, *options, initial_state, output_final_state, cu_seqlens)


def test_time_training_step(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, weights: Mapping[str, Tensor], *, state: Mapping[str, Tensor],
    inner: Literal["linear", "mlp"] = "linear", norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
    momentum: Tensor | None = None, decay: Tensor | None = None, position_scale: Tensor | None = None,
    mini_batch: int = 16,
) -> Tensor:  # fmt: skip
    """One token: o [B, 1, Hv, V]; the tensors of `state` are overwritten (`test_time_training_state` makes the first).
    No gradient."""
    q, k, v = checks.autocast(q, k, v)
    options = (inner, norm_weight, norm_bias, momentum, decay, position_scale, mini_batch)
    _check(q, k, v, lr, weights, *options, state, None, step=True)
    own = [state[key] for key in (*names(inner, momentum is not None, decay is not None), OFFSET)]
    return _STEP(q, k, v, lr, *options, own)


def _step(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, inner: str, *rest: Any) -> Tensor:
    weight, bias, momentum, decay, position_scale, mini_batch, (*state, offset) = rest
    dtype, norm = q.dtype, None if weight is None else (weight, bias)
    row = scale = None
    if position_scale is not None:  # at the place of each sequence's token
        row = position_scale[..., offset.long()].reshape(-1, offset.shape[0]).mT
        scale = row[..., None, None]
    with checks.autocast_off(q):
        tokens = (x.transpose(1, 2) for x in prepare(q, k, v))
        gates = (None if x is None else x.mT for x in (lr, momentum, decay))
        full = offset == mini_batch - 1
        o, after = advance(len(WEIGHTS[inner]), norm, scale, row, tuple(state), *tokens, *gates, None, full)
    for old, new in zip((*state, offset), (*after, (offset + 1) % mini_batch), strict=True):
        old.copy_(new)
    return o.transpose(1, 2).to(dtype)


ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor lr, str inner, Tensor? norm_weight, Tensor? norm_bias, "
ARGUMENTS += "Tensor? momentum, Tensor? decay, Tensor? position_scale, int mini_batch"
_STEP = steps.in_place("test_time_training_step", ARGUMENTS, _step, tree=True)


def _check(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, weights: Any, inner: str, *rest: Any, step: bool = False
) -> Any:
    """The norm as a pair, or None."""
    weight, bias, momentum, decay, position_scale, mini_batch, state, cu_seqlens = rest
    checks.check_qkv(q, k, v)
    checks.check_gate("lr", lr, q, v.shape[:3], "B T Hv", required=True)
    checks.check_gate("momentum", momentum, q, v.shape[:3], "B T Hv")
    checks.check_gate("decay", decay, q, v.shape[:3], "B T Hv")
    if inner not in WEIGHTS:
        raise ValueError(f'inner is {inner!r}; it must be "linear" or "mlp"')
    shapes = _shapes(weights, inner, q, v)
    _check_tree("weights", weights, shapes, q)
    norm = None if weight is None and bias is None else (weight, bias)
    for name, x in zip(("norm_weight", "norm_bias"), norm or (), strict=False):
        checks.check_gate(name, x, q, v.shape[2:], "Hv V", required=True)
    if norm and q.shape[3] != v.shape[3]:
        raise ValueError(f"v has V = {v.shape[3]}; a norm adds the inner model's input, so it must be {q.shape[3]}")
    if not isinstance(mini_batch, int) or isinstance(mini_batch, bool) or mini_batch < 1:
        raise ValueError(f"mini_batch is {mini_batch!r}; it must be a whole number of at least 1")
    checks.check_form("position_scale", position_scale, q, {"C": (mini_batch,), "Hv C": (v.shape[2], mini_batch)})
    checks.check_sequences("q", q, cu_seqlens, step)
    if step or state is not None:
        parts = shapes | {"retained": ("Hv", v.shape[2:3]), OFFSET: ("", ())}
        keys, n = names(inner, momentum is not None, decay is not None), checks.count_sequences(q, cu_seqlens)
        found = {key: parts[key.partition("/")[2] or key] for key in (*keys, OFFSET)}
        found = {key: (f"N {dims}".strip(), (n, *sizes)) for key, (dims, sizes) in found.items()}
        _check_tree("state" if step else "initial_state", state, found, q)
    return norm


def _shapes(weights: Any, inner: str, q: Tensor, v: Tensor) -> Shapes:
    """Of the weights; F is that of b1, which is checked with them."""
    width, hidden, out = ("K", q.shape[3]), ("V", v.shape[3]), ("V", v.shape[3])
    if inner == "mlp":
        b1 = weights.get("b1") if isinstance(weights, Mapping) else None
        hidden = ("F", b1.shape[-1] if isinstance(b1, Tensor) and b1.dim() else 0)
    layers = {"W1": (width, hidden), "b1": (hidden,), "W2": (hidden, out), "b2": (out,)}
    axes = {name: tuple(zip(("Hv", v.shape[2]), *layers[name], strict=True)) for name in WEIGHTS[inner]}
    return {name: (" ".join(dims), sizes) for name, (dims, sizes) in axes.items()}


def _check_tree(name: str, tree: object, shapes: Shapes, q: Tensor) -> None:
    """A mapping of fp32 (fp64) tensors of exactly these names and shapes."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{name} is {type(tree).__name__}; it must be a mapping of {', '.join(shapes)}")
    if set(tree) != set(shapes):
        raise ValueError(f"{name} has {', '.join(map(str, tree)) or 'nothing'}; it must have {', '.join(shapes)}")
    for key, (dims, sizes) in shapes.items():
        checks.check_shape(f"{name}[{key!r}]", tree[key], sizes, dims)
        dtype = torch.int32 if key == OFFSET else checks.state_dtype(q.dtype)
        checks.check_like(f"{name}[{key!r}]", tree[key], q, dtype)
