"""Lightning attention: linear attention with a fixed decay per head, smaller in deeper layers (Qin et al. 2023,
arXiv 2307.14995 and 2401.04658; MiniMax-01, arXiv 2501.08313).

    S_t = exp(-s_h) S_{t-1} + k_t^T v_t,   o_t = q_t S_t,   q, k, v = silu(x W)
    y_t = (sigmoid(x_t W_g) * norm(o_t)) W_o,   the norm over all heads side by side

Head h of H (from 0), layer l of L (from 0) decays by
    minimax          s_h = 2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5)
    transnormerllm   s_h = (8 h / H) (1 - l / L)

B batch, T new tokens, H heads, K key and V value head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.features import cosine_pair, fixed_decay
from zoo.architectures.core.linear import projection_args, recur, recurrent_bytes
from zoo.architectures.core.mixer import Context, grouped, keep_fp32, wide, wide_dtype
from zoo.architectures.core.output import OPEN_GATE, SCALE, GatedOutput, OutputArgs, open_gate
from zoo.architectures.core.plan import AttentionSpec, MixerPlan
from zoo.architectures.core.recurrent import transferred_rows
from zoo.errors import ZooError

EXAMPLE = {"heads": 2, "head_dim": 16, "layer_index": 1, "depth": 4}
VARIANTS = {
    "transnormerllm": {
        **EXAMPLE,
        "value_dim": 24,
        "slopes": "transnormerllm",
        "value_activation": None,
        "gate": "linear",
        "norm_weight": False,
        "lrpe": True,
    }
}
SLOPES = ("minimax", "transnormerllm")


@dataclass(frozen=True, kw_only=True)
class Args(OutputArgs):
    """MiniMax's layer is the default.

    `slopes` is the rule above and `layer_index` its l of `depth` L; `activation` is that of queries and keys,
    `value_activation` that of values (silu or None). `lrpe` turns queries and keys by learned angles per position,
    `[x cos, x sin]` (Qin et al. 2023, arXiv 2307.09270), which doubles the state.
    """

    slopes: str = "minimax"
    layer_index: int = 0
    depth: int = 1
    activation: str | None = "silu"
    value_activation: str | None = "silu"
    lrpe: bool = False
    gate: str | None = "sigmoid"
    norm_full: bool = True
    norm_eps: float = 1e-6

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        if self.slopes not in SLOPES:
            raise ZooError(f"slopes {self.slopes!r} is unknown; it must be one of {', '.join(SLOPES)}")
        if not 0 <= self.layer_index < self.depth:
            raise ZooError(f"layer_index was {self.layer_index}; it must be from 0 to {self.depth - 1} (depth - 1)")
        for name in ("activation", "value_activation"):
            if (value := getattr(self, name)) not in (None, "silu"):
                raise ZooError(f"{name} {value!r} is unknown; it must be silu, or null for none")


class LightningAttention(GatedOutput):
    options = Args
    starts = (SCALE,)

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.key_dim, self.value_dim = args, args.head_dim, args.value_dim or args.head_dim
        self.make_projections(config, args, self.value_dim)
        self.make_output(config, args, self.value_dim)
        if args.lrpe:
            self.theta = keep_fp32(nn.Parameter(torch.zeros(self.heads, self.key_dim, dtype=torch.float32)))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.args.lrpe:
            exponents = torch.arange(self.heads * self.key_dim) * (-2 / (self.heads * self.key_dim))
            initialization.copy_(self.theta, (10000**exponents).view_as(self.theta))

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        count = spec.heads if heads is None else len(heads)
        args = projection_args(spec, count) | OPEN_GATE | {"norm_full": False}
        args |= {"activation": None, "value_activation": None}
        inits = open_gate(count, spec.head_dim, spec.hidden_size)
        return MixerPlan(args=args, rows=transferred_rows(spec, heads), inits=inits)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        v = self.v_proj(x)
        v = grouped(F.silu(v) if self.args.value_activation else v, self.heads)
        return self.finish(self.mix_values(x, v, ctx, cache), x)

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        projected = (projection(x) for projection in (self.q_proj, self.k_proj))
        q, k = (grouped(F.silu(part) if self.args.activation else part, self.heads) for part in projected)
        q, k = self.rotated(q, k, ctx)
        if self.args.lrpe:
            angles = ctx.positions[..., None, None] * wide(self.theta)
            q, k = cosine_pair(q, angles), cosine_pair(k, angles)
        return recur(q, ctx.mask(k), ctx.mask(v), fixed_decay(self.log_decay(q), q, ctx), ctx, cache, scale=1.0)

    def log_decay(self, q: Tensor) -> Tensor:
        """`-s_h`, `[H]` in fp32 (fp64 beside fp64), on q's device."""
        index, depth = self.args.layer_index, self.args.depth
        heads = torch.arange(self.heads, dtype=wide_dtype(q), device=q.device)
        if self.args.slopes == "minimax":
            return -torch.exp2(-8 / self.heads * (heads + 1)) * (1 - index / (depth - 1 + 1e-5) + 1e-5)
        return -8 / self.heads * (1 - index / depth) * heads

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, (1 + self.args.lrpe) * self.key_dim, self.value_dim)


MODULE = LightningAttention
