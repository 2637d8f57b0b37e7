"""Post-norm residual blocks.

`x + norm(f(x))` for mixer, then channel: the norm sees the branch alone (OLMo 2, Walsh et al. 2024, arXiv 2501.00656).
With `norm_of="sum"`: `norm(alpha x + f(x))`, the original Transformer (Vaswani et al. 2017, arXiv 1706.03762), and
DeepNorm where alpha is not 1 (Wang et al. 2022, arXiv 2203.00555).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.architectures.core import mixer
from zoo.architectures.core.block import Block, Run
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.norms import make_norm
from zoo.errors import ZooError

VARIANTS = {"sum": {"norm_of": "sum"}, "deepnorm": {"norm_of": "sum", "alpha": 1.7}}


@dataclass(frozen=True, kw_only=True)
class Args(mixer.Args):
    """`norm_of` is branch or sum; `alpha` multiplies the residual stream (DeepNorm: `(2 layers) ** 0.25`)."""

    norm_of: str = "branch"
    alpha: float = 1.0

    def check(self, config: DecoderConfig) -> None:
        if self.norm_of not in ("branch", "sum"):
            raise ZooError(f"norm_of was {self.norm_of!r}; it must be branch or sum")


class PostNorm(Block):
    options = Args

    def build(self, config: DecoderConfig, args: Args) -> None:  # type: ignore[override]
        self.args = args
        if self.mixer is not None:
            self.mixer_norm = make_norm(config.norm, config.hidden_size)
        if self.channel is not None:
            self.channel_norm = make_norm(config.norm, config.hidden_size)

    def wire(self, x: Tensor, run: Run) -> Tensor:
        if self.mixer is not None:
            x = self._joined(x, run.mix(x), self.mixer_norm)
        if self.channel is not None:
            x = self._joined(x, run.transform(x), self.channel_norm)
        return x

    def _joined(self, x: Tensor, branch: Tensor, norm: nn.Module) -> Tensor:
        x = x if self.args.alpha == 1.0 else x * self.args.alpha
        joined: Tensor = norm(x + branch) if self.args.norm_of == "sum" else x + norm(branch)
        return joined


MODULE = PostNorm
