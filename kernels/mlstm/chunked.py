"""The matrix LSTM in chunks, as linear attention (the letters are those of its package)."""

from typing import Any

from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.mlstm.maxima import under_maxima
from zoo.kernels.mlstm.reference import State, prepare
from zoo.kernels.packed import low_precision, product
from zoo.kernels.sequential import carry


def run(*args: Any) -> tuple[Tensor, State]:
    return under_maxima(_read, args)


def _read(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, gain: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    scale, state, cu_seqlens = rest
    low, (q, k, v) = low_precision(q), prepare(q, k, v, scale)
    plan = ch.layout(q.shape[1], cu_seqlens)
    inside = ch.inside(plan, decay.unsqueeze(-1), None)
    q, k, v = plan.split(q), plan.split(k * gain.exp().unsqueeze(-1)), plan.split(v)
    entering, final = carry(plan, inside.total(), inside.to_end(k).mT @ v, state)
    scores, q = inside.scores(q, k), inside.from_start(q)
    found = plan.join(product(q, entering, low) + product(scores, v, low))
    if low is None:
        return found[..., :-1], found[..., -1], final
    # Only the numerator is rounded to `low`. The normaliser may be a small difference of large sums, and its maximum
    # with exp(-m) has a kink that would send gradients the wrong way.
    normal = plan.join(q @ entering[..., -1:] + scores.sum(-1, keepdim=True))
    return found[..., :-1], normal[..., 0], final
