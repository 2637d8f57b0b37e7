"""The long-term memory of Titans (Behrouz et al. 2025, arXiv 2501.00663): a small network that learns what it reads.

    S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2 / 2,   M_t = (1 - alpha_t) M_{t-1} + S_t,   o_t = M_t(q_t)
    q, k, v = silu(conv(x W)), q and k of length 1;   eta, theta, alpha = sigmoid(x W + b), theta times `base_lr`

Gradients are taken at the weights with which a mini-batch began; the first weights are learned.

B batch, T new tokens, N sequences, D hidden size, H heads, K head dimension, F hidden width of the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.cache_view import CacheView
from zoo.architectures.core.mixer import Context, grouped, keep_fp32, wide
from zoo.architectures.core.norms import L2Norm
from zoo.architectures.core.recurrent import ConvStates
from zoo.architectures.core.test_time import Learner, Tree, learn

REMEMBERING = -4.0  # alpha starts at sigmoid of this


class Network(nn.Module):
    """The first weights of every head's network; `forward() -> {name: [H, ...]}` in fp32, by the op's names.

    `width` is F of a network of two layers, None that of one.
    """

    def __init__(self, heads: int, head_dim: int, width: int | None) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {"W1": (head_dim, head_dim), "b1": (head_dim,)}
        if width is not None:
            self.shapes = {"W1": (head_dim, width), "b1": (width,), "W2": (width, head_dim), "b2": (head_dim,)}
        for name, shape in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(heads, *shape)))

    @property
    def inner(self) -> Literal["linear", "mlp"]:
        return "mlp" if "W2" in self.shapes else "linear"

    def reset(self) -> None:
        """Matrices at the scale of their inputs, biases zero."""
        for name, shape in self.shapes.items():
            if len(shape) == 2:
                initialization.normal_(getattr(self, name), std=1 / math.sqrt(shape[0]))
            else:
                initialization.zeros_(getattr(self, name))

    def forward(self) -> dict[str, Tensor]:
        return {name: wide(getattr(self, name)) for name in self.shapes}


class Gates(nn.Module):
    """`forward(x [B, T, D])`: theta, and the logs of eta and 1 - alpha, `[B, T, H]` in fp32."""

    def __init__(self, hidden: int, heads: int, base_lr: float) -> None:
        super().__init__()
        self.heads, self.base_lr = heads, base_lr
        self.proj = nn.Linear(hidden, 3 * heads, bias=False)
        self.gate_bias = keep_fp32(nn.Parameter(torch.zeros(3, heads, dtype=torch.float32)))

    def reset(self) -> None:
        start = torch.tensor([[0.0], [0.0], [REMEMBERING]])
        initialization.copy_(self.gate_bias, start.expand(3, self.heads))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        theta, eta, alpha = (wide(self.proj(x)).unflatten(-1, (3, self.heads)) + wide(self.gate_bias)).unbind(-2)
        decay = F.logsigmoid(-alpha)
        return {"lr": theta.sigmoid() * self.base_lr, "momentum": F.logsigmoid(eta), "decay": decay}


class NeuralMemory(nn.Module):
    """`forward(x [B, T, D], ctx, cache) -> [B, T, D]`."""

    def __init__(
        self, hidden: int, heads: int, head_dim: int, *, width: int | None, mini_batch: int, conv: int, base_lr: float
    ) -> None:
        super().__init__()
        self.heads, self.mini_batch, channels = heads, mini_batch, heads * head_dim
        self.q_proj = nn.Linear(hidden, channels, bias=False)
        self.k_proj = nn.Linear(hidden, channels, bias=False)
        self.v_proj = nn.Linear(hidden, channels, bias=False)
        self.convs = ConvStates({"q": channels, "k": channels, "v": channels}, conv, "silu")
        self.l2 = L2Norm(head_dim)
        self.gates = Gates(hidden, heads, base_lr)
        self.network = Network(heads, head_dim, width)
        self.o_proj = nn.Linear(channels, hidden, bias=False)

    @property
    def learner(self) -> Learner:
        options: Any = dict(inner=self.network.inner, mini_batch=self.mini_batch, forgets=True)
        return Learner(weights=self.network(), **options)

    def reset(self) -> None:
        """The first weights and the gates; little is forgotten."""
        self.network.reset()
        self.gates.reset()

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | CacheView | None = None) -> Tensor:
        projections = (("q", self.q_proj), ("k", self.k_proj), ("v", self.v_proj))
        q, k, v = (self.convs(name, ctx.mask(p(x)), ctx, cache) for name, p in projections)
        return self._out(learn(self.learner, self._tokens(q, k, v, x), ctx, cache), x)

    def advance(self, x: Tensor, state: Tree, mask: Tensor | None) -> tuple[Tensor, Tree]:
        """Outputs `[N, T, D]` for `x [N, T, D]` and the next state, without a cache and short convolutions."""
        q, k, v = (F.silu(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        o, state = self.learner.run(self._tokens(q, k, v, x), state, mask)
        return self._out(o, x), state

    def read(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """What the weights in `state`, one set per row of `x [N, T, D]`, answer: `[N, T, D]`. They learn nothing."""
        q = wide(self.l2(grouped(F.silu(self.q_proj(x)), self.heads)))
        z = torch.einsum("nthk,nhkv->nthv", q, state["W1"]) + state["b1"][:, None]
        if self.network.inner == "mlp":
            z = torch.einsum("nthk,nhkv->nthv", F.gelu(z, approximate="tanh"), state["W2"]) + state["b2"][:, None]
        return self._out(z, x)

    def _tokens(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Tensor]:
        """What the op takes of every token."""
        q, k, v = (grouped(part, self.heads) for part in (q, k, v))
        return {"q": self.l2(q), "k": self.l2(k), "v": v, **self.gates(x)}

    def _out(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(o.to(x.dtype).flatten(-2))

    def state_bytes(self, itemsize: int) -> int:
        """Bytes held for one sequence: weights, gradients and momentum, what is left of the weights, the place."""
        numbers = 3 * sum(math.prod(shape) for shape in self.network.shapes.values()) + 1
        held = self.heads * numbers * torch.float32.itemsize + torch.int32.itemsize
        return held + self.convs.state_bytes(itemsize)
