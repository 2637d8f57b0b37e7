"""Effective state size of softmax attention (Parnichkun et al. 2025, arXiv 2504.19561): how large a recurrent state is
that computes what a layer does on sample text.

A head's output is `W v` with the lower-triangular attention weights `W [T, T]`. A recurrence that gives the same output
needs at token i a state of at least rank(W[i:, :i]) rows. With that block's singular values s_1 >= s_2 >= ... and
p_j = s_j / sum(s):

    tolerance variant: #{s_j > tolerance * s_1},     entropy variant: exp(-sum_j p_j ln p_j)

B batch, T tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.conversion.core.align import Seen, watched
from zoo.conversion.core.scored import Scored
from zoo.conversion.core.verify import softmax_weights

TOLERANCE = 1e-3
PLACES = 8  # tokens of a row at which the state is measured


def state_sizes(weights: Tensor, places: Collection[int], tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """Effective state sizes `[B, H]` by tolerance and by entropy, mean over `places`, of `weights [B, H, T, T]`.

    Args:
        places: tokens i, from 1 to T - 1.
        tolerance: share of the largest singular value that still counts.
    """
    counts, entropies = [], []
    for place in places:
        values = torch.linalg.svdvals(weights[..., place:, :place].double())
        counts.append((values > tolerance * values[..., :1]).sum(-1).double())
        shares = values / values.sum(-1, keepdim=True).clamp(min=1e-300)
        entropies.append(torch.special.entr(shares).sum(-1).exp())
    return torch.stack(counts).mean(0), torch.stack(entropies).mean(0)


@torch.no_grad()
def measure_states(model: Any, ids: Tensor, layers: Collection[int], scored: Scored) -> dict[int, dict[str, float]]:
    """By layer: `tolerance` and `entropy`, summed over heads, mean over the rows of `ids [B, T]`."""
    inputs: dict[int, Seen] = {}

    def sizes(layer: int) -> dict[str, float]:
        if not inputs:  # a run that goes on may need none of them
            with watched(model, list(layers)) as recorder:
                model.model(input_ids=ids.to(model.device), use_cache=False)
            inputs.update(recorder.seen)
        seen, mixer = inputs[layer], model.model.layers[layer].mixer
        q, k, _ = (x.double().transpose(1, 2) for x in mixer.expanded_qkv(seen.x, seen.ctx))
        places = sorted({max(1, round(ids.shape[1] * n / (PLACES + 1))) for n in range(1, PLACES + 1)})
        weights = softmax_weights(mixer.args, q, k, seen.ctx.positions[0])
        found = state_sizes(weights, places)
        return {name: float(x.sum(1).mean()) for name, x in zip(("tolerance", "entropy"), found, strict=True)}

    return {layer: scored.get(f"state/{layer}", partial(sizes, layer)) for layer in layers}
