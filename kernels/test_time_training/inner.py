"""The inner model and the gradient of its loss, written out, so that autograd sees plain products.

Shapes: `...` is [B, Hv], C tokens, K and V head widths, F hidden width. A layer is (W [..., F, V], b [..., V]); the
gradient of a token is X_t^T E_t for W and E_t for b, with X [..., C, F] what enters the layer and E [..., C, V] the
gradient of the loss where the layer's result leaves it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6

Layer = tuple[Tensor, Tensor]
Norm = tuple[Tensor, Tensor]


def layers(weights: tuple[Tensor, ...]) -> list[Layer]:
    """(W1, b1, W2, b2) in pairs."""
    return list(zip(weights[::2], weights[1::2], strict=True))


def apply(layer: Layer, x: Tensor) -> Tensor:
    return x @ layer[0] + layer[1].unsqueeze(-2)


def activate(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def finish(z: Tensor, x: Tensor, norm: Norm | None) -> Tensor:
    """f(x) from the last layer's result."""
    if norm is None:
        return z
    weight, bias = (y.unsqueeze(-2) for y in norm)
    return x + F.layer_norm(z, z.shape[-1:], eps=EPSILON) * weight + bias


def errors(model: list[Layer], k: Tensor, v: Tensor, norm: Norm | None) -> list[tuple[Tensor, Tensor]]:
    """(X, E) of every layer for the loss |f(k) - v|^2 / 2."""
    entering, results = [k], [apply(model[0], k)]
    for layer in model[1:]:
        entering.append(activate(results[-1]))
        results.append(apply(layer, entering[-1]))
    found = [_last_error(results[-1], k, v, norm)]
    for (w, _), z in zip(model[:0:-1], results[-2::-1], strict=True):
        found.append(torch.ops.aten.gelu_backward(found[-1] @ w.mT, z, approximate="tanh"))
    return list(zip(entering, found[::-1], strict=True))


def _last_error(z: Tensor, k: Tensor, v: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return z - v
    weight, bias = (y.unsqueeze(-2) for y in norm)
    centred = z - z.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    unit = centred * inverse
    error = (unit * weight + bias + k - v) * weight
    return inverse * (error - error.mean(-1, keepdim=True) - unit * (error * unit).mean(-1, keepdim=True))
