"""RWKV-7 "Goose" time mixing (Peng et al. 2025, arXiv 2503.14456): a delta rule whose erase and write vectors differ,
with decays, learning rates and value mixes that the tokens choose.

    S_t = (Diag(w_t) - (eta_t kappa_t)^T kappa_t) S_{t-1} + k'_t^T v_t,   o_t = r_t S_t + (r_t rho k'_t^T) v_t
    w = exp(-e^{-1/2} sigmoid(low_w)),  eta = sigmoid(low_eta),  kappa = normalised(xi k),  k' = k (1 + (eta - 1) alpha)
    v = v' + (v'_first - v') sigmoid(low_v),   y_t = (g_t * norm(o_t)) W_o,   g = sigmoid(x G) G'

low_* are low-rank maps of the shifted input, v'_first is the value of the model's first layer, the norm (before the
bonus term) is a layer norm of each head.

B batch, T new tokens, D hidden size, H heads, K head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.linear import (
    NORM_START,
    RotatedKeys,
    check_norm,
    check_sizes,
    decay_rates,
    projection_args,
    recurrent_bytes,
)
from zoo.architectures.core.mixer import Context, Output, grouped, keep_fp32, wide
from zoo.architectures.core.norms import head_norm
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan, Start
from zoo.architectures.core.recurrent import check_rope, continued, transferred_rows
from zoo.architectures.core.token_shift import HeadArgs, LowRank, decay_speeds, mixed, ramp, token_shift
from zoo.errors import ZooError
from zoo.kernels.dplr import dplr, dplr_step

EXAMPLE = {"heads": 2, "head_dim": 16, "decay_rank": 8, "rate_rank": 8, "value_rank": 4, "gate_rank": 8}
VARIANTS = {
    "first": {**EXAMPLE, "first_value": "write"},
    "later": {**EXAMPLE, "first_value": "read", "layer_index": 1, "depth": 3},
}
BEFORE = (("rwkv7", VARIANTS["first"]),)
FIRST_VALUE = "first_value"
SHIFTED = ("r", "w", "k", "v", "a", "g")  # rows of `mix`
SLOWEST = math.exp(-0.5)  # the largest rate of decay


@dataclass(frozen=True, kw_only=True)
class Args(HeadArgs):
    """Ranks of the maps for the decay w, the learning rate eta, the value mix and the gate.

    `first_value` says what becomes of the first layer's value: "write" hands this layer's on, "read" mixes it in,
    None does neither. The biases, `qk_norm` and `rope` are softmax attention's, for conversion from it.
    """

    decay_rank: int = 64
    rate_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128
    first_value: str | None = None
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    qk_norm: str | None = None
    qk_norm_full: bool = False
    qk_norm_eps: float = 1e-6
    rope: str | None = None

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_sizes(
            decay_rank=self.decay_rank, rate_rank=self.rate_rank, value_rank=self.value_rank, gate_rank=self.gate_rank
        )
        if self.first_value not in (None, "write", "read"):
            raise ZooError(f"first_value {self.first_value!r} is unknown; it must be write or read, or null for none")
        check_norm("qk_norm", self.qk_norm)
        check_rope(self.rope, config)


class RWKV7(RotatedKeys):
    options = Args
    starts = (
        Start(target="decay_map.offset", means="rate", form=lambda rates, args: decay_offsets(rates)),
        Start(target="rate_map.offset", means="beta", form=lambda beta, args: beta.logit()),
        Start(target="norm_weight", means="scale"),
    )

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.width, self.heads = args, config.hidden_size, args.heads
        inner = args.heads * args.head_dim
        self.mix = nn.Parameter(torch.zeros(len(SHIFTED), self.width))
        self.r_proj = nn.Linear(self.width, inner, bias=args.q_bias)
        self.k_proj = nn.Linear(self.width, inner, bias=args.k_bias)
        self.v_proj = nn.Linear(self.width, inner, bias=args.v_bias)
        self.o_proj = nn.Linear(inner, self.width, bias=args.o_bias)
        self.make_rotation(config, args, args.heads, args.head_dim)
        self.decay_map = LowRank(self.width, args.decay_rank, inner, torch.tanh)
        self.rate_map = LowRank(self.width, args.rate_rank, inner)
        self.gate_map = LowRank(self.width, args.gate_rank, inner, torch.sigmoid, offset=False)
        if args.first_value == "read":
            self.value_map = LowRank(self.width, args.value_rank, inner)
        self.erase_scale, self.rate_scale = nn.Parameter(torch.ones(inner)), nn.Parameter(torch.ones(inner))
        self.bonus = keep_fp32(nn.Parameter(torch.zeros(args.heads, args.head_dim, dtype=torch.float32)))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(inner)), nn.Parameter(torch.zeros(inner))

    @classmethod
    def reads_of(cls, args: Args) -> tuple[str, ...]:
        return (FIRST_VALUE,) if args.first_value == "read" else ()

    @classmethod
    def writes_of(cls, args: Args) -> tuple[str, ...]:
        return (FIRST_VALUE,) if args.first_value == "write" else ()

    def init_weights(self, std: float) -> None:
        """As published: deeper layers look back less, channels from slow to fast, and a zigzag within each head."""
        args, inner, weights = self.args, self.heads * self.args.head_dim, ramp(self.width)
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2]) * args.left
        initialization.copy_(self.mix, 1 - weights ** powers[:, None])
        line = torch.arange(inner) / max(inner - 1, 1) - 0.5
        zigzag = torch.linspace(-1, 1, args.head_dim).repeat(self.heads)
        zigzag = zigzag * zigzag.abs()
        speeds = decay_speeds(inner, -6.0, 6.0, 1 + args.risen**0.3)
        initialization.copy_(self.decay_map.offset, speeds + 0.5 + 2.5 * zigzag)
        initialization.copy_(self.rate_map.offset, -0.19 + 0.3 * zigzag + 0.4 * line)
        if args.first_value == "read":
            initialization.copy_(self.value_map.offset, 0.73 - 0.4 * line)
        initialization.copy_(self.erase_scale, 0.71 - 0.1 * line)
        initialization.constant_(self.rate_scale, 1.02)
        initialization.constant_(self.bonus, -0.04)
        initialization.ones_(self.norm_weight)
        initialization.zeros_(self.norm_bias)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        count, d, width = spec.heads if heads is None else len(heads), spec.head_dim, spec.hidden_size
        args = projection_args(spec, count)
        rows = (replace(row, target=row.target.replace("q_proj", "r_proj")) for row in transferred_rows(spec, heads))
        offsets = decay_offsets(decay_rates(count, spec.max_position)).repeat_interleave(d)
        rank = int(spec.wanted.get("gate_rank", Args.gate_rank))
        inits = (
            Init(target="mix", shape=(len(SHIFTED), width), kind="zeros"),  # no shift
            *low_rank(spec, "decay", count * d, offsets.tolist()),
            *low_rank(spec, "rate", count * d, [0.0] * count * d),
            Init(target="gate_map.down.weight", shape=(rank, width), kind="normal", options={"std": 0.02}),
            # over sigmoids of a half: the gate starts open, at about one
            Init(target="gate_map.up.weight", shape=(count * d, rank), kind="constant", options={"value": 2 / rank}),
            *(Init(target=name, shape=(count * d,), kind="ones") for name in ("erase_scale", "rate_scale")),
            Init(target="bonus", shape=(count, d), kind="zeros", fp32=True),
            Init(target="norm_weight", shape=(count * d,), kind="constant", options={"value": NORM_START}),
            Init(target="norm_bias", shape=(count * d,), kind="zeros"),
        )
        return MixerPlan(args=args, rows=tuple(rows), inits=inits)

    def expanded_qkv(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        return self._heads(dict.fromkeys(SHIFTED, x), ctx)

    def _heads(self, inputs: Mapping[str, Tensor], ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """r, k and v `[B, T, H, K]` of the shifted inputs, with attention's qk-norm and RoPE."""
        projections = {"r": self.r_proj, "k": self.k_proj, "v": self.v_proj}
        r, k, v = (grouped(projection(inputs[name]), self.heads) for name, projection in projections.items())
        return *self.rotated(r, k, ctx), v

    def _shifted(self, x: Tensor, ctx: Context, cache: LayerCache | None) -> dict[str, Tensor]:
        """The input of each part, mixed with the token before."""
        before = token_shift(x, ctx, cache)
        return {name: mixed(x, before, share) for name, share in zip(SHIFTED, self.mix, strict=True)}

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Output:
        """`x [B, T, D] -> [B, T, D]`, and the value `[B, T, H K]` of a layer that writes it."""
        inputs = self._shifted(x, ctx, cache)
        r, k, v = self._heads(inputs, ctx)
        written = {FIRST_VALUE: v.flatten(-2)} if self.args.first_value == "write" else {}
        if self.args.first_value == "read":
            first = grouped(ctx.values[FIRST_VALUE].to(v.dtype), self.heads)
            v = mixed(v, first, grouped(self.value_map(inputs["v"]).sigmoid(), self.heads))
        rate = grouped(self.rate_map(inputs["a"]).sigmoid(), self.heads)
        o = self._recur(r, k, v, rate, inputs, ctx, cache)
        k = self._written(k, rate)
        o = wide(head_norm(o, self.norm_weight, self.norm_bias, self.args.norm_eps))
        bonus = (wide(r) * wide(k) * wide(self.bonus)).sum(-1, keepdim=True) * wide(v)
        y = self.o_proj((self.gate_map(inputs["g"]) * (o + bonus.flatten(-2))).to(x.dtype))
        return (y, written) if written else y

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        inputs = self._shifted(x, ctx, cache)
        r, k, _ = self._heads(inputs, ctx)
        rate = grouped(self.rate_map(inputs["a"]).sigmoid(), self.heads)
        return self._recur(r, k, v, rate, inputs, ctx, cache)

    def _recur(
        self, r: Tensor, k: Tensor, v: Tensor, rate: Tensor, inputs: Mapping[str, Tensor], ctx: Context,
        cache: LayerCache | None,
    ) -> Tensor:  # fmt: skip
        """The recurrence over r, k, v and the learning `rate`, each `[B, T, H, K]`."""
        erase = F.normalize(wide(k * self.erase_scale.unflatten(0, (self.heads, -1)).to(k.dtype)), dim=-1)
        a, b = (ctx.mask(part.to(v.dtype)) for part in (-erase, erase * rate))
        tensors = (r, ctx.mask(self._written(k, rate)), ctx.mask(v), a, b, self._decay(inputs["w"], ctx))
        states = {"state": (self.heads, self.args.head_dim, self.args.head_dim)}
        return continued(dplr, dplr_step, tensors, states, ctx, cache, scale=1.0)

    def _written(self, k: Tensor, rate: Tensor) -> Tensor:
        """k', `[B, T, H, K]`."""
        return (wide(k) * (1 + (rate - 1) * wide(self.rate_scale.unflatten(0, (self.heads, -1))))).to(k.dtype)

    def _decay(self, x: Tensor, ctx: Context) -> Tensor:
        """Log decay `[B, T, H, K]` in fp32; padding does not forget."""
        return ctx.mask(grouped(-SLOWEST * self.decay_map(x).sigmoid(), self.heads))

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.args.head_dim, self.args.head_dim) + self.width * itemsize


def decay_offsets(rates: Tensor) -> Tensor:
    """The offset of the decay map of each rate, as far as rates can be had."""
    return (rates / SLOWEST).clamp(max=0.95).logit()


def low_rank(spec: AttentionSpec, name: str, channels: int, offsets: list[float]) -> tuple[Init, ...]:
    """The map `{name}_map`, small at the start and with a gradient in both of its factors."""
    rank, small = int(spec.wanted.get(f"{name}_rank", getattr(Args, f"{name}_rank"))), {"std": 0.02}
    prefix, fixed = f"{name}_map.", {"values": offsets}
    return (
        Init(target=prefix + "down.weight", shape=(rank, spec.hidden_size), kind="normal", options=small),
        Init(target=prefix + "up.weight", shape=(channels, rank), kind="normal", options=small),
        Init(target=prefix + "offset", shape=(channels,), kind="values", options=fixed, fp32=True),
    )


MODULE = RWKV7
