"""Effective state size of softmax attention (Parnichkun et al. 2025, arXiv 2504.19561): how large a recurrent state is
that computes what a layer does on sample text.

`zoo.architectures.core.mixing` says how it is measured.

B batch, T tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.mixing import softmax_weights, state_places, state_sizes
from zoo.architectures.core.watched import Seen, watched
from zoo.conversion.core.scored import Scored


@torch.no_grad()
def measure_states(model: Any, ids: Tensor, layers: Collection[int], scored: Scored) -> dict[int, dict[str, float]]:
    """By layer: `tolerance` and `entropy`, summed over heads, mean over the rows of `ids [B, T]`."""
    inputs: dict[int, Seen] = {}

    def sizes(layer: int) -> dict[str, float]:
        if not inputs:  # a run that goes on may need none of them
            with watched(model, list(layers)) as seen_by_layer:
                model.model(input_ids=ids.to(model.device), use_cache=False)
            inputs.update(seen_by_layer)
        seen, mixer = inputs[layer], model.model.layers[layer].mixer
        q, k, _ = (x.double().transpose(1, 2) for x in mixer.expanded_qkv(seen.x, seen.ctx))
        weights = softmax_weights(mixer.args, q, k, seen.ctx.positions[0])
        found = state_sizes(weights, state_places(ids.shape[1]))
        return {name: float(x.sum(1).mean()) for name, x in zip(("tolerance", "entropy"), found, strict=True)}

    return {layer: scored.get(f"state/{layer}", partial(sizes, layer)) for layer in layers}
