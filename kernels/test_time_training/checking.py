"""Validation of test_time_training's arguments.

Shapes: B batch, T tokens, N sequences, Hv value heads, K and V head widths, F hidden width, C tokens of a mini-batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.test_time_training.states import OFFSET, WEIGHTS, names


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: Mapping[str, Tensor],
    inner: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    momentum: Tensor | None,
    decay: Tensor | None,
    position_scale: Tensor | None,
    mini_batch: int,
) -> None:
    checks.check_qkv(q, k, v)
    checks.check_tensor("lr", lr)
    for name, gate in (("lr", lr), ("momentum", momentum), ("decay", decay)):
        checks.check_gate(name, gate, q, v.shape[:3], "B T Hv")
    _check_weights(weights, inner, q, v)
    _check_norm(norm_weight, norm_bias, q, v)
    _check_mini_batch(mini_batch, position_scale, q, v)


def _check_weights(weights: Mapping[str, Tensor], inner: str, q: Tensor, v: Tensor) -> None:
    if inner not in WEIGHTS:
        raise ValueError(f'inner is {inner!r}; it must be "linear" or "mlp"')
    check_names("weights", weights, WEIGHTS[inner])
    heads, k_width, v_width = v.shape[2], q.shape[3], v.shape[3]
    checks.check_dims("weights['b1']", weights["b1"], "Hv F" if inner == "mlp" else "Hv V")
    hidden = weights["b1"].shape[-1] if inner == "mlp" else v_width
    dims = {"W1": "Hv K F", "b1": "Hv F"} if inner == "mlp" else {"W1": "Hv K V", "b1": "Hv V"}
    shapes = {"W1": (k_width, hidden), "b1": (hidden,), "W2": (hidden, v_width), "b2": (v_width,)}
    dims |= {"W2": "Hv F V", "b2": "Hv V"}
    for name in WEIGHTS[inner]:
        checks.check_gate(f"weights[{name!r}]", weights[name], q, (heads, *shapes[name]), dims[name])


def check_names(name: str, tree: object, expected: tuple[str, ...]) -> None:
    """A mapping of tensors with exactly these names."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{name} is {type(tree).__name__}; it must be a mapping of {', '.join(expected)}")
    if set(tree) != set(expected):
        raise ValueError(f"{name} has {', '.join(map(str, tree)) or 'nothing'}; it must have {', '.join(expected)}")
    for key in expected:
        checks.check_tensor(f"{name}[{key!r}]", tree[key])


def _check_norm(weight: Tensor | None, bias: Tensor | None, q: Tensor, v: Tensor) -> None:
    if weight is None and bias is None:
        return
    for name, x in (("norm_weight", weight), ("norm_bias", bias)):
        checks.check_tensor(name, x)
        checks.check_gate(name, x, q, v.shape[2:], "Hv V")
    if q.shape[3] != v.shape[3]:
        raise ValueError(
            f"v has V = {v.shape[3]}; with a norm the inner model adds its input, so it must be {q.shape[3]}"
        )


def _check_mini_batch(mini_batch: int, position_scale: Tensor | None, q: Tensor, v: Tensor) -> None:
    if not isinstance(mini_batch, int) or isinstance(mini_batch, bool) or mini_batch < 1:
        raise ValueError(f"mini_batch is {mini_batch!r}; it must be a whole number of at least 1")
    if position_scale is None:
        return
    checks.check_tensor("position_scale", position_scale)
    shapes = (mini_batch,), (v.shape[2], mini_batch)
    if tuple(position_scale.shape) not in shapes:
        raise ValueError(
            f"position_scale has shape {list(position_scale.shape)}; it must be [C] = {list(shapes[0])} or "
            f"[Hv, C] = {list(shapes[1])}"
        )
    checks.check_like("position_scale", position_scale, q, checks.state_dtype(q.dtype))


def check_tree(
    name: str,
    state: Mapping[str, Tensor] | None,
    q: Tensor,
    weights: Mapping[str, Tensor],
    inner: str,
    momentum: Tensor | None,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """A state of this call: the names that its options ask for, of the right shapes."""
    if state is None:
        return
    n = checks.count_sequences(q, cu_seqlens)
    floats = names(inner, momentum is not None, decay is not None)
    check_names(name, state, (*floats, OFFSET))
    for key in floats:
        shape = weights[key.partition("/")[2] or key].shape if key != "retained" else weights["b1"].shape[:1]
        dims = ["N", "Hv", "K", "V"][: len(shape) + 1]
        checks.check_gate(f"{name}[{key!r}]", state[key], q, (n, *shape), " ".join(dims))
    checks.check_shape(f"{name}['offset']", state[OFFSET], (n,), "N")
    checks.check_like(f"{name}['offset']", state[OFFSET], q, torch.int32)
