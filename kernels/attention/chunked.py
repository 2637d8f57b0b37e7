"""Attention in torch: scaled_dot_product_attention where it needs no mask tensor, blocks of queries otherwise."""

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.attention.mask import Call
from zoo.kernels.attention.reference import attend
from zoo.kernels.checks import state_dtype

BLOCK = 256  # queries


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    if not call.sdpa:
        return attend(call, BLOCK, state_dtype(call.q.dtype))
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    causal, grouped = call.mask.causal and q.shape[2] > 1, q.shape[1] > k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=call.scale, enable_gqa=grouped)
    return o.transpose(1, 2), None
