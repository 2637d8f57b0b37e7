"""What mixers over the `weighted_average` op share: the average over the cache.

B batch, T new tokens, A channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.mixer import Context, wide_dtype
from zoo.kernels.weighted_average import weighted_average, weighted_average_step

STATES = {"numerator": 0.0, "denominator": 0.0, "maximum": -1e38}  # and what an empty one holds


def averaged(
    k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, ctx: Context, cache: LayerCache | None
) -> Tensor:
    """`weighted_average` of `k, v [B, T, A]`, padding weighing nothing; the cache's states `[B, A]` are continued and
    kept. The decay is None, `[A]` or `[B, T, A]`; padding does not forget."""
    if ctx.padding_mask is not None:
        k = k.masked_fill(~ctx.padding_mask[..., None], -torch.inf)
        decay = None if decay is None else ctx.mask(decay.expand(k.shape))
    if cache is None:
        return weighted_average(k, v, decay, bonus, cu_seqlens=ctx.cu_seqlens)[0]
    shape, dtype = (k.shape[0], k.shape[2]), wide_dtype(k)
    parts = (cache.state(name, shape, dtype, "recurrent", k.device, fill) for name, fill in STATES.items())
    numerator, denominator, maximum = parts
    state = (numerator, denominator, maximum)
    if ctx.phase == "decode" and k.shape[1] == 1 and not torch.is_grad_enabled():
        return weighted_average_step(k, v, decay, bonus, state=state)
    o, new = weighted_average(k, v, decay, bonus, initial_state=state, output_final_state=True)
    assert new is not None
    for name, value in zip(STATES, new, strict=True):
        cache.put(name, value)
    return o


def average_bytes(channels: int) -> int:
    """Bytes of the states in fp32."""
    return len(STATES) * channels * torch.float32.itemsize
