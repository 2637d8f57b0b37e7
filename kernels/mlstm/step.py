"""The matrix LSTM for one token at a time (decoding)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.mlstm.checking import check, state_parts
from zoo.kernels.mlstm.reference import normalised, prepare


@torch.no_grad()
def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    state: tuple[Tensor, Tensor, Tensor],
    scale: float | None = None,
) -> Tensor:
    """One token of `mlstm`: the same arguments with T = 1.

    `state` is (C [B, Hv, K, V], n [B, Hv, K], m [B, Hv]), fp32 (fp64 beside fp64 inputs); its tensors are overwritten.
    Returns h [B, 1, Hv, V] in q's dtype. No gradient.
    """
    q, k, v = checks.autocast(q, k, v)
    check(q, k, v, input_gate, forget_gate, scale)
    checks.check_one_token(q)
    checks.check_states("state", state, q, state_parts(q, v, q.shape[0]), optional=False)
    dtype, (c, n, m) = q.dtype, state
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x[:, 0] for x in prepare(q, k, v))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        faded = F.logsigmoid(forget_gate[:, 0]) + m
        m.copy_(torch.maximum(faded, input_gate[:, 0]))
        kept, key = (faded - m).exp().unsqueeze(-1), (input_gate[:, 0] - m).exp().unsqueeze(-1) * k
        c.mul_(kept.unsqueeze(-1)).add_(key.unsqueeze(-1) * v[..., None, :-1])
        n.mul_(kept).add_(key)
        read = torch.cat([(q.unsqueeze(-2) @ c).squeeze(-2), (q * n).sum(-1, keepdim=True)], -1)
        return normalised(scale * read, m).unsqueeze(1).to(dtype)
