"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): `y = sum_{e in top-k} w_e expert_e(x) + shared(x)`.

`w` comes from a router, `s = softmax(W x)` or `sigmoid(W x)`. No expert has a capacity: every token gets its top-k.

B batch, T tokens, N = B T, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core import mixer
from zoo.architectures.core.activations import check_activation
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.experts import Dense, Experts
from zoo.architectures.core.mixer import Context, Part, keep_fp32, wide
from zoo.errors import ZooError

EXAMPLE = {"experts": 4, "top_k": 2, "intermediate_size": 48}
VARIANTS = {
    "grouped": {
        **EXAMPLE,
        "router": "sigmoid",
        "correction_bias": True,
        "groups": 2,
        "top_groups": 1,
        "scale": 2.5,
        "normalise": True,
        "normalise_eps": 1e-20,
        "shared_size": 32,
    },
    "shared_gate": {**EXAMPLE, "normalise": True, "shared_size": 32, "shared_gate": True},
    "clamped": {**EXAMPLE, "softmax_after": True, "router_bias": True, "bias": True, "limit": 7.0},
    "weight_input": {**EXAMPLE, "top_k": 1, "router": "sigmoid", "weight_input": True, "shared_size": 48},
    "plain": {**EXAMPLE, "gated": False, "activation": "relu2", "latent_size": 32, "shared_size": 32},
}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """The closed list of options of mixtures of experts.

    `intermediate_size` is an expert's inner width. `router` is softmax or sigmoid, `router_bias` that of its linear
    map; `correction_bias` moves the choice of experts and not their weights (DeepSeek-V3). With `groups`, experts are
    chosen inside the `top_groups` groups with the largest sum of their two best scores. `softmax_after` takes the
    softmax over the chosen scores alone (gpt-oss, Granite); `normalise` divides the chosen weights by
    their sum plus `normalise_eps`; `scale` multiplies them. `weight_input` weights an expert's input, not its output
    (Llama 4). Experts are `gated` (`act(gate) * up`) or plain, with a `bias`, and with `limit` the clamped SwiGLU of
    gpt-oss (`core/experts.py`). `latent_size` is a narrower width in which they work (Nemotron-H). `shared_size` is
    the inner width of one expert that takes every token; `shared_gate` multiplies it by `sigmoid(w x)` (Qwen3-Next).
    """

    experts: int
    top_k: int
    intermediate_size: int
    router: str = "softmax"
    router_bias: bool = False
    correction_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    softmax_after: bool = False
    normalise: bool = False
    normalise_eps: float = 0.0
    scale: float = 1.0
    weight_input: bool = False
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    limit: float | None = None
    latent_size: int | None = None
    shared_size: int | None = None
    shared_gate: bool = False

    def check(self, config: DecoderConfig) -> None:
        for name in ("experts", "top_k", "intermediate_size", "groups", "top_groups", "latent_size", "shared_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ZooError(f"{name} was {value}; it must be at least 1")
        check_activation(self.activation)
        if self.router not in ("softmax", "sigmoid"):
            raise ZooError(f"router was {self.router!r}; it must be softmax or sigmoid")
        if self.experts % self.groups or self.top_groups > self.groups:
            raise ZooError(
                f"groups was {self.groups} with {self.experts} experts and top_groups {self.top_groups}; "
                "groups must divide the experts, and top_groups must not exceed it"
            )
        if self.top_k > (allowed := self.experts // self.groups * self.top_groups):
            raise ZooError(f"top_k was {self.top_k}; it must be at most the {allowed} experts to choose from")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.softmax_after and (self.router != "softmax" or self.correction_bias or self.normalise):
            raise ZooError("softmax_after was given; it needs router softmax, without correction_bias and normalise")
        if self.limit is not None and (not self.gated or self.limit <= 0):
            raise ZooError(f"limit was {self.limit}; it must be positive, and experts gated")
        if self.shared_gate and self.shared_size is None:
            raise ZooError("shared_gate was given without a shared expert; give its shared_size")


class Router(nn.Linear):
    """Scores of experts in fp32, or fp64; a module that is called, so that its weights may be kept elsewhere."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else wide(self.bias)
            return F.linear(wide(input), wide(self.weight), bias)


class MixtureOfExperts(Part):
    options = Args
    correction_bias: Tensor

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args = args
        width, narrow = config.hidden_size, args.latent_size or config.hidden_size
        self.router = Router(width, args.experts, bias=args.router_bias)
        if args.correction_bias:  # moved by balancing rules, not by gradients
            self.register_buffer("correction_bias", keep_fp32(torch.zeros(args.experts, dtype=torch.float32)))
        if args.latent_size is not None:
            self.latent_in = nn.Linear(width, narrow, bias=False)
            self.latent_out = nn.Linear(narrow, width, bias=False)
        self.experts = Experts(
            args.experts, narrow, args.intermediate_size, args.activation, args.gated, args.bias, args.limit
        )
        if args.shared_size is not None:
            self.shared = Dense(width, args.shared_size, args.activation, args.gated)
        if args.shared_gate:
            self.shared_gate = nn.Linear(width, 1, bias=False)

    def init_weights(self, std: float) -> None:
        self.experts.init_weights(std)
        if self.args.correction_bias:
            initialization.zeros_(self.correction_bias)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts and their weights, each `[N, K]`, of `x [N, D]`."""
        args = self.args
        logits = self.router(x)
        if args.softmax_after:
            weight, index = logits.topk(args.top_k, dim=-1)
            return index, weight.softmax(-1) * args.scale
        scores = logits.sigmoid() if args.router == "sigmoid" else logits.softmax(-1)
        choice = scores + self.correction_bias if args.correction_bias else scores
        if args.top_groups < args.groups:
            choice = self._inside_top_groups(choice)
        elif not args.correction_bias:
            choice = logits  # large ones differ where their scores are all 1
        index = choice.topk(args.top_k, dim=-1).indices
        weight = scores.gather(-1, index)
        if args.normalise:
            weight = weight / (weight.sum(-1, keepdim=True) + args.normalise_eps)
        return index, weight * args.scale

    def _inside_top_groups(self, choice: Tensor) -> Tensor:
        grouped = choice.unflatten(-1, (self.args.groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        chosen = torch.zeros_like(best).scatter(-1, best.topk(self.args.top_groups, dim=-1).indices, 1.0)
        return grouped.masked_fill(chosen[..., None] == 0, float("-inf")).flatten(-2)

    def forward(self, x: Tensor, ctx: Context, cache: object = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        flat = x.flatten(0, 1)
        index, weight = self.route(flat)
        inner = flat if self.args.latent_size is None else self.latent_in(flat)
        y = self._routed(inner, index, weight).to(x.dtype)
        if self.args.latent_size is not None:
            y = self.latent_out(y)
        if self.args.shared_size is not None:
            shared = self.shared(flat)
            y = y + (shared * torch.sigmoid(self.shared_gate(flat)) if self.args.shared_gate else shared)
        return y.view_as(x)

    def _routed(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Each row of `x [N, D]` through its K experts, and their weighted sum."""
        owner, order = index.flatten().sort(stable=True)
        rows = x[order // self.args.top_k]
        if self.args.weight_input:
            rows = rows * weight.flatten()[order, None].to(rows.dtype)
        out = self.experts(rows, owner)[order.argsort()].unflatten(0, index.shape)
        if self.args.weight_input:
            return out.sum(1)
        return torch.bmm(weight[:, None].to(out.dtype), out).squeeze(1)


MODULE = MixtureOfExperts
