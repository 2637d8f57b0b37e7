"""DeltaNet (Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484): the delta rule, no decay.

    S_t = S_{t-1} + k_t^T beta_t (v_t - k_t S_{t-1}),   o_t = q_t S_t,   beta_t = sigmoid(x_t W)
    q, k = silu(conv(x W)), of length 1;   v = silu(conv(x W));   y_t = rms(o_t) W_o

B batch, T new tokens, H heads, K key and V value head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.delta import recur
from zoo.architectures.core.linear import check_width, projection_args, recurrent_bytes, strength_bias
from zoo.architectures.core.mixer import Context, grouped, wide
from zoo.architectures.core.output import OPEN_GATE, SCALE, GatedOutput, OutputArgs, open_gate
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan, Start
from zoo.architectures.core.recurrent import ConvStates, identity_convs, transferred_rows
from zoo.errors import ZooError

EXAMPLE = {"heads": 2, "head_dim": 16, "value_dim": 24}
VARIANTS = {"negative": {"heads": 2, "head_dim": 16, "conv": 3, "gate": "silu", "beta_scale": 2.0, "beta_bias": True}}


@dataclass(frozen=True, kw_only=True)
class Args(OutputArgs):
    """The published layer is the default.

    `conv` is the width of the short convolutions on q, k and v (0: none), followed by `conv_activation`; `beta_scale`
    2 allows negative eigenvalues (Grazzi et al. 2024, arXiv 2411.12537); `scale` is the query scale (None:
    `head_dim ** -0.5`).
    """

    conv: int = 4
    conv_activation: str | None = "silu"
    beta_scale: float = 1.0
    beta_bias: bool = False
    gate: str | None = None
    scale: float | None = None

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        check_width(self.conv, self.conv_activation)
        if not 0 < self.beta_scale <= 2:
            raise ZooError(f"beta_scale was {self.beta_scale}; it must be above 0 and at most 2")


class DeltaNet(GatedOutput):
    options = Args
    starts = (Start(target="b_proj.bias", means="beta", form=strength_bias), SCALE)

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.args, self.key_dim, self.value_dim = args, args.head_dim, args.value_dim or args.head_dim
        self.make_projections(config, args, self.value_dim)
        self.make_output(config, args, self.value_dim)
        self.b_proj = nn.Linear(config.hidden_size, self.heads, bias=args.beta_bias)
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.convs = ConvStates({"q": keys, "k": keys, "v": values}, args.conv, args.conv_activation)

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        count, d = spec.heads if heads is None else len(heads), spec.head_dim
        args = projection_args(spec, count) | OPEN_GATE | {"conv_activation": None, "beta_bias": True}
        inits = (
            Init(target="b_proj.weight", shape=(count, spec.hidden_size), kind="zeros"),
            Init(target="b_proj.bias", shape=(count,), kind="zeros"),
            *identity_convs(spec, ("q", "k", "v"), count * d),
            *open_gate(count, d, spec.hidden_size),
        )
        return MixerPlan(args=args, rows=transferred_rows(spec, heads), inits=inits)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D] -> [B, T, D]`."""
        v = grouped(self.convs("v", ctx.mask(self.v_proj(x)), ctx, cache), self.heads)
        return self.finish(self.mix_values(x, v, ctx, cache), x)

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        projections = (("q", self.q_proj), ("k", self.k_proj))
        q, k = (grouped(self.convs(n, ctx.mask(p(x)), ctx, cache), self.heads) for n, p in projections)
        q, k = self.rotated(q, k, ctx)
        beta = ctx.mask(wide(self.b_proj(x)).sigmoid() * self.args.beta_scale)
        return recur(q, ctx.mask(k), ctx.mask(v), beta, None, ctx, cache, scale=self.args.scale)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return recurrent_bytes(self.heads, self.key_dim, self.value_dim) + self.convs.state_bytes(itemsize)


MODULE = DeltaNet
