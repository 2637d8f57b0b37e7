"""What mixers over the `weighted_average` op share: the average over the cache.

B batch, T new tokens, A channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.recurrent import continued
from zoo.kernels.weighted_average import weighted_average, weighted_average_step

STATES = {"numerator": 0.0, "denominator": 0.0, "maximum": -1e38}  # and what an empty one holds


def averaged(
    k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, ctx: Context, cache: LayerCache | None
) -> Tensor:
    """`weighted_average` of `k, v [B, T, A]`, padding weighing nothing, over the cache's states `[B, A]`. The decay is
    None, `[A]` or `[B, T, A]`; padding does not forget."""
    if ctx.padding_mask is not None:
        k = k.masked_fill(~ctx.padding_mask[..., None], -torch.inf)
        decay = None if decay is None else ctx.mask(decay.expand(k.shape))
    states, fills = dict.fromkeys(STATES, k.shape[2:]), tuple(STATES.values())
    return continued(weighted_average, weighted_average_step, (k, v, decay, bonus), states, ctx, cache, fills=fills)


def average_bytes(channels: int) -> int:
    """Bytes of the states in fp32."""
    return len(STATES) * channels * torch.float32.itemsize
