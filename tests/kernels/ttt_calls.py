"""Calls of test-time training with every tensor under a flat name.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths, C tokens of a mini-batch.
"""

from __future__ import annotations

import torch

from zoo.kernels import test_time_training as ttt

MINI_BATCH = 6
TOKENS = ("q", "k", "v", "lr", "momentum", "decay")


def inputs(kind, t, *, b=2, n=None, dtype=torch.float64, strength=1.0, with_state=True):
    """The tensors of a call under flat names; `call` puts them together."""
    h, hv, k, hidden = 1, 2, 4, 5
    v = k if "norm" in kind else 3
    made = {
        "q": torch.randn(b, t, h, k, dtype=dtype),
        "k": torch.randn(b, t, h, k, dtype=dtype),
        "v": torch.randn(b, t, hv, v, dtype=dtype),
        "lr": 0.1 * torch.rand(b, t, hv, dtype=dtype),
    }
    if "norm" in kind:
        made |= {"norm_weight": torch.rand(hv, v, dtype=dtype) + 0.5, "norm_bias": torch.randn(hv, v, dtype=dtype)}
    for gate in ("momentum", "decay"):
        if gate in kind or "all" in kind:
            made[gate] = -strength * torch.rand(b, t, hv, dtype=dtype)
    if "rows" in kind:
        made["position_scale"] = 1 / torch.arange(1.0, MINI_BATCH + 1, dtype=dtype)
    elif "all" in kind:
        made["position_scale"] = torch.rand(hv, MINI_BATCH, dtype=dtype)
    widths = (k, hidden, v) if kind.startswith("mlp") else (k, v)
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False), 1):
        made[f"weights.W{i}"] = torch.randn(hv, fan_in, fan_out, dtype=dtype) / fan_in**0.5
        made[f"weights.b{i}"] = torch.randn(hv, fan_out, dtype=dtype)
    return made | (state_of(made, kind, n or b, dtype) if with_state else {})


def state_of(made, kind, n, dtype):
    """A random state in the middle of a mini-batch; its offsets are not among the tensors with gradients."""
    weights = {name.partition(".")[2]: x for name, x in made.items() if name.startswith("weights.")}
    has = {"momentum": "momentum" in made, "decay": "decay" in made}
    state = ttt.test_time_training_state(weights, n, inner=kind.split()[0], **has)
    found = {f"state.{name}": x + 0.1 * torch.randn_like(x) for name, x in state.items() if name != "offset"}
    if "decay" in made:
        found["state.retained"] = torch.rand(n, 2, dtype=dtype)
    return found


def offsets(n):
    return (torch.arange(n, dtype=torch.int32) * 4 + 2) % MINI_BATCH


def split_names(tensors):
    """The arguments of the op from flat names."""
    plain = {name: x for name, x in tensors.items() if "." not in name}
    weights = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith("weights.")}
    state = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith("state.")}
    plain |= {"weights": weights, "inner": "mlp" if "W2" in weights else "linear", "mini_batch": MINI_BATCH}
    return plain, state


def call(offset=None, backend=None, cu_seqlens=None, **tensors):
    """o and the float tensors of the final state."""
    plain, state = split_names(tensors)
    begin = state | {"offset": offset} if state else None
    options = {"output_final_state": True, "backend": backend, "cu_seqlens": cu_seqlens}
    o, final = ttt.test_time_training(**plain, initial_state=begin, **options)
    return o, *(x for name, x in final.items() if name != "offset")


def cut(tensors, begin, end):
    return {name: x[:, begin:end] if name in TOKENS else x for name, x in tensors.items()}
